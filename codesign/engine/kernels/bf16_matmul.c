/* y = x Wt for few rows of bf16 x and a W of packed int4 or int8 codes, on AVX-512 with BF16 dot products.
 *
 * Codes are small integers and exact in bf16, so a vector of 32 codes is widened to bf16 once and every row of x takes
 * it in with one instruction: half of what fp32 (packed_matmul.c) needs. Sums are fp32; groups are scaled once, as there.
 *
 * int4 weights are in ATen's AVX-512 order: blocks of 64 outputs, [in, 32] bytes each, low nibbles outputs 0..31, high
 * nibbles outputs 32..63. scale_and_zero is [groups, out, 2] bf16, for w = (code - 8) scale + zero.
 * int8 weights are [out, in]; the caller scales its outputs.
 */
#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define TILE 8        /* rows of x at once, by what the registers hold */
#define PREFETCH 2048 /* bytes ahead of what is read */
/* int8 codes come into L2 first: rows of 4096 bytes share their place in L1 and push each other out of it. */
#define INT8_FAR 16384

typedef __m512 vec;

INLINE vec to_float(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

/* 32 codes into the sums of one step; `mask` of those of x that are there, all of them where the codes are. */
INLINE void int8_add(int rows, int steps, int step, const uint16_t *x, __m512bh wide, __mmask32 mask, vec *sum,
                     int num_in) {
    for (int m = 0; m < rows; m++) {
        const uint16_t *from = x + (long)m * num_in;
        __m512i own = mask == 0xFFFFFFFF ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from);
        sum[m * steps + step] = _mm512_dpbf16_ps(sum[m * steps + step], (__m512bh)own, wide);
    }
}

/* `steps` vectors of a row of codes at once, for `rows` rows of x; both constants where inlined. */
INLINE void int8_tile(int rows, int steps, const uint16_t *x, const int8_t *codes, float *y, int num_in, int num_out) {
    vec sum[TILE * 4];
    for (int i = 0; i < rows * steps; i++) sum[i] = _mm512_setzero_ps();
    int k = 0;
    for (; k + 32 * steps <= num_in; k += 32 * steps) {
        for (int line = k; line < k + 32 * steps; line += 64) {
            _mm_prefetch(codes + line + PREFETCH, _MM_HINT_T0);
            _mm_prefetch(codes + line + INT8_FAR, _MM_HINT_T1);
        }
        for (int step = 0; step < steps; step++) {
            const int8_t *from = codes + k + 32 * step;
            __m512bh wide = _mm512_cvtne2ps_pbh(to_float(from + 16), to_float(from));
            int8_add(rows, steps, step, x + k + 32 * step, wide, 0xFFFFFFFF, sum, num_in);
        }
    }
    for (; k < num_in; k += 16) {
        __m512bh wide = _mm512_cvtne2ps_pbh(_mm512_setzero_ps(), to_float(codes + k));
        int8_add(rows, steps, 0, x + k, wide, 0xFFFF, sum, num_in);
    }
    for (int m = 0; m < rows; m++) {
        vec all = sum[m * steps];
        for (int step = 1; step < steps; step++) all = _mm512_add_ps(all, sum[m * steps + step]);
        y[(long)m * num_out] = _mm512_reduce_add_ps(all);
    }
}

#define INT8_ROWS(R, STEPS) \
    case R: \
        int8_tile(R, STEPS, x + (long)first * num_in, codes + (long)n * num_in, y + (long)first * num_out + n, num_in, \
                  num_out); \
        break;

/* x [rows, num_in] bf16, codes [num_out, num_in], num_in a multiple of 16, y [rows, num_out] fp32, not yet scaled. */
void int8_matmul(const uint16_t *x, int num_rows, const int8_t *codes, float *y, int num_in, int num_out) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < num_out; n++)
        for (int first = 0; first < num_rows; first += TILE) switch (num_rows - first < TILE ? num_rows - first : TILE) {
                INT8_ROWS(1, 4) INT8_ROWS(2, 4) INT8_ROWS(3, 2) INT8_ROWS(4, 2)
                INT8_ROWS(5, 2) INT8_ROWS(6, 2) INT8_ROWS(7, 2) INT8_ROWS(8, 2)
            }
}

/* 16 bytes of input k and 16 of k + 1 -> pairs (k, k + 1) of the 16 outputs in the low nibbles, and of those in the high. */
INLINE void widen(const uint8_t *codes, __m512bh *low, __m512bh *high) {
    const __m512i bf16_of = _mm512_castsi256_si512(_mm256_setr_epi16(
        0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160,
        0x4170));
    __m128i here = _mm_loadu_si128((const __m128i *)codes), next = _mm_loadu_si128((const __m128i *)(codes + 32));
    __m512i both = _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(here, next), _mm_unpacklo_epi8(here, next)));
    *low = (__m512bh)_mm512_permutexvar_epi16(_mm512_and_si512(both, _mm512_set1_epi16(15)), bf16_of);
    *high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), bf16_of);
}

/* Outputs c.. and 32 + c.. of one block, `parts` times 16 each, for `rows` rows of x; both constants where inlined. */
INLINE void int4_part(int rows, int parts, const uint16_t *x, const float *group_sums, const uint8_t *block, int c,
                      const uint16_t *pairs, float *y, int num_in, int num_out, int group_size) {
    int num_groups = num_in / group_size;
    vec total[TILE][4];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < 2 * parts; n++) total[m][n] = _mm512_setzero_ps();
    for (int g = 0; g < num_groups; g++) {
        vec sum[TILE][4];
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < 2 * parts; n++) sum[m][n] = _mm512_setzero_ps();
        for (int k = g * group_size; k < (g + 1) * group_size; k += 2) {
            const uint8_t *codes = block + (long)k * 32 + c;
            _mm_prefetch(codes + PREFETCH, _MM_HINT_T0);
            for (int part = 0; part < parts; part++) {
                __m512bh low, high;
                widen(codes + 16 * part, &low, &high);
                for (int m = 0; m < rows; m++) {
                    int two; /* x[m][k] and x[m][k + 1] */
                    __builtin_memcpy(&two, x + (long)m * num_in + k, 4);
                    __m512bh own = (__m512bh)_mm512_set1_epi32(two);
                    sum[m][2 * part] = _mm512_dpbf16_ps(sum[m][2 * part], own, low);
                    sum[m][2 * part + 1] = _mm512_dpbf16_ps(sum[m][2 * part + 1], own, high);
                }
            }
        }
        for (int n = 0; n < 2 * parts; n++) {
            int output = c + n / 2 * 16 + 32 * (n % 2);
            __m512i both = _mm512_loadu_si512(pairs + ((long)g * num_out + output) * 2);
            vec scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            vec zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000)));
            vec middle = _mm512_fnmadd_ps(scale, _mm512_set1_ps(8.0f), zero);
            for (int m = 0; m < rows; m++) {
                vec group_sum = _mm512_set1_ps(group_sums[(long)m * num_groups + g]);
                total[m][n] = _mm512_fmadd_ps(middle, group_sum, _mm512_fmadd_ps(scale, sum[m][n], total[m][n]));
            }
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < 2 * parts; n++)
            _mm512_storeu_ps(y + (long)m * num_out + c + n / 2 * 16 + 32 * (n % 2), total[m][n]);
}

/* Few rows take a whole block at once, so that its bytes are read once and in order. */
#define INT4_ROWS(R, PARTS) \
    case R: \
        for (int c = 0; c < 32; c += 16 * PARTS) \
            int4_part(R, PARTS, x_rows, sums, block, c, pairs, y_rows, num_in, num_out, group_size); \
        break;

/* x [rows, num_in] bf16, packed [num_out / 64][num_in][32], group_sums [rows, groups] scratch, y [rows, num_out] fp32. */
void int4_matmul(const uint16_t *x, int num_rows, const uint8_t *packed, const uint16_t *scale_and_zero,
                 float *group_sums, float *y, int num_in, int num_out, int group_size) {
    int num_groups = num_in / group_size;
    for (long i = 0; i < (long)num_rows * num_groups; i++) {
        float sum = 0;
        for (int k = 0; k < group_size; k++) {
            uint32_t bits = (uint32_t)x[i * group_size + k] << 16;
            float value;
            __builtin_memcpy(&value, &bits, 4);
            sum += value;
        }
        group_sums[i] = sum;
    }
#pragma omp parallel for schedule(static)
    for (int b = 0; b < num_out / 64; b++) {
        const uint8_t *block = packed + (long)b * num_in * 32;
        const uint16_t *pairs = scale_and_zero + (long)b * 128;
        for (int first = 0; first < num_rows; first += TILE) {
            int rows = num_rows - first < TILE ? num_rows - first : TILE;
            const uint16_t *x_rows = x + (long)first * num_in;
            const float *sums = group_sums + (long)first * num_groups;
            float *y_rows = y + (long)first * num_out + b * 64;
            switch (rows) {
                INT4_ROWS(1, 2) INT4_ROWS(2, 2) INT4_ROWS(3, 1) INT4_ROWS(4, 1)
                INT4_ROWS(5, 1) INT4_ROWS(6, 1) INT4_ROWS(7, 1) INT4_ROWS(8, 1)
            }
        }
    }
}
