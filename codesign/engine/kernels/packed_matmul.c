/* y = x Wt for few rows of x and a W of packed int4 or int8 codes, on AVX2 or AVX-512.
 *
 * ATen's kernels for these weights are bound by unpacking, on AVX2 at 5-6 weights a nanosecond and core whatever the
 * bits. Here a code is scaled once per group and not once per weight:
 *
 *     y[m][n] = sum over groups g:  scale[g][n] * (sum over k in g: x[m][k] code[n][k])  +  middle[g][n] * sum x[m][k]
 *
 * so that the inner loop is one widening, one conversion and one FMA per vector of weights and row of x, and rows of x
 * are taken several at a time to share the unpacking. All sums are fp32.
 *
 * int4 weights are in ATen's order: blocks of 4 LANES outputs, [in, 2 LANES] bytes each, low nibbles the first half of
 * the outputs, high nibbles the second. scale_and_zero is [groups, out, 2] in bf16 or fp16, for
 * w = (code - 8) scale + zero. int8 weights are [out, in]; the caller scales its outputs.
 */
#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#define PREFETCH 2048 /* bytes ahead of what is read */

#ifdef __AVX512F__
#define LANES 16
#define INT4_TILE 6 /* rows of x at once, by what the registers hold */
#define INT8_TILE 6
typedef __m512 vec;
typedef __m512i ivec;
#define zero_vec _mm512_setzero_ps
#define add _mm512_add_ps
#define fmadd _mm512_fmadd_ps
#define spread(p) _mm512_set1_ps(*(p))
#define load_vec _mm512_loadu_ps
#define store_vec _mm512_storeu_ps
#define to_float _mm512_cvtepi32_ps
#define add_up _mm512_reduce_add_ps
INLINE ivec load_bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE ivec load_signed(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
/* A permutation looks at four bits of its index, so it is mask and conversion in one. */
INLINE vec low_nibble(ivec codes) {
    return _mm512_permutexvar_ps(codes, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
INLINE vec high_nibble(ivec codes) { return low_nibble(_mm512_srli_epi32(codes, 4)); }

/* LANES (scale, zero) pairs of 16 bits each; middle = zero - 8 scale. */
INLINE void load_scales(const uint16_t *pairs, int is_half, vec *scale, vec *middle) {
    ivec both = _mm512_loadu_si512(pairs);
    vec zero;
    if (is_half) {
        *scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
        zero = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    } else {
        *scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000)));
    }
    *middle = _mm512_fnmadd_ps(*scale, _mm512_set1_ps(8.0f), zero);
}
#else
#define LANES 8
#define INT4_TILE 6
#define INT8_TILE 3
typedef __m256 vec;
typedef __m256i ivec;
#define zero_vec _mm256_setzero_ps
#define add _mm256_add_ps
#define fmadd _mm256_fmadd_ps
#define spread _mm256_broadcast_ss
#define load_vec _mm256_loadu_ps
#define store_vec _mm256_storeu_ps
#define to_float _mm256_cvtepi32_ps
INLINE ivec load_bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE ivec load_signed(const int8_t *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE vec low_nibble(ivec codes) { return to_float(_mm256_and_si256(codes, _mm256_set1_epi32(15))); }
INLINE vec high_nibble(ivec codes) { return to_float(_mm256_srli_epi32(codes, 4)); }

INLINE float add_up(vec v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* LANES (scale, zero) pairs of 16 bits each; middle = zero - 8 scale. */
INLINE void load_scales(const uint16_t *pairs, int is_half, vec *scale, vec *middle) {
    ivec both = _mm256_loadu_si256((const __m256i *)pairs);
    vec zero;
    if (is_half) {
        ivec low = _mm256_and_si256(both, _mm256_set1_epi32(0xFFFF)), high = _mm256_srli_epi32(both, 16);
        ivec packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
        *scale = _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
        zero = _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1));
    } else {
        *scale = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        zero = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xFFFF0000)));
    }
    *middle = _mm256_fnmadd_ps(*scale, _mm256_set1_ps(8.0f), zero);
}
#endif

/* Outputs c.. and 2 LANES + c.. of one block, `parts` LANES each, for `rows` rows of x; both constants where inlined. */
INLINE void int4_part(int rows, int parts, const float *x, const float *group_sums, const uint8_t *block, int c,
                      const uint16_t *pairs, int is_half, float *y, int num_in, int num_out, int group_size) {
    int num_groups = num_in / group_size;
    vec total[INT4_TILE][4];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < 2 * parts; n++) total[m][n] = zero_vec();
    for (int g = 0; g < num_groups; g++) {
        vec sum[INT4_TILE][4];
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < 2 * parts; n++) sum[m][n] = zero_vec();
        for (int k = g * group_size; k < (g + 1) * group_size; k++) {
            const uint8_t *codes = block + (long)k * 2 * LANES + c;
            _mm_prefetch(codes + PREFETCH, _MM_HINT_T0);
            for (int part = 0; part < parts; part++) {
                ivec both = load_bytes(codes + part * LANES);
                vec low = low_nibble(both), high = high_nibble(both);
                for (int m = 0; m < rows; m++) {
                    vec value = spread(x + (long)m * num_in + k);
                    sum[m][2 * part] = fmadd(value, low, sum[m][2 * part]);
                    sum[m][2 * part + 1] = fmadd(value, high, sum[m][2 * part + 1]);
                }
            }
        }
        for (int n = 0; n < 2 * parts; n++) {
            vec scale, middle;
            load_scales(pairs + ((long)g * num_out + c + n / 2 * LANES + 2 * LANES * (n % 2)) * 2, is_half, &scale,
                        &middle);
            for (int m = 0; m < rows; m++) {
                total[m][n] = fmadd(scale, sum[m][n], total[m][n]);
                total[m][n] = fmadd(middle, spread(group_sums + (long)m * num_groups + g), total[m][n]);
            }
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < 2 * parts; n++)
            store_vec(y + (long)m * num_out + c + n / 2 * LANES + 2 * LANES * (n % 2), total[m][n]);
}

/* Few rows take a whole block at once, so that its bytes are read once and in order. */
#define INT4_ROWS(R, PARTS) \
    case R: \
        for (int c = 0; c < 2 * LANES; c += PARTS * LANES) \
            int4_part(R, PARTS, x_rows, sums, block, c, pairs, is_half, y_rows, num_in, num_out, group_size); \
        break;

/* x [rows, num_in] fp32, packed [num_out / (4 LANES)][num_in][2 LANES], group_sums [rows, groups] scratch,
 * y [rows, num_out]. */
void int4_matmul(const float *x, int num_rows, const uint8_t *packed, const uint16_t *scale_and_zero, int is_half,
                 float *group_sums, float *y, int num_in, int num_out, int group_size) {
    int num_groups = num_in / group_size;
    for (long i = 0; i < (long)num_rows * num_groups; i++) {
        float sum = 0;
        for (int k = 0; k < group_size; k++) sum += x[i * group_size + k];
        group_sums[i] = sum;
    }
#pragma omp parallel for schedule(static)
    for (int b = 0; b < num_out / (4 * LANES); b++) {
        const uint8_t *block = packed + (long)b * num_in * 2 * LANES;
        const uint16_t *pairs = scale_and_zero + (long)b * 8 * LANES;
        for (int first = 0; first < num_rows; first += INT4_TILE) {
            int rows = num_rows - first < INT4_TILE ? num_rows - first : INT4_TILE;
            const float *x_rows = x + (long)first * num_in, *sums = group_sums + (long)first * num_groups;
            float *y_rows = y + (long)first * num_out + b * 4 * LANES;
            switch (rows) {
                INT4_ROWS(1, 2) INT4_ROWS(2, 2) INT4_ROWS(3, 1) INT4_ROWS(4, 1) INT4_ROWS(5, 1) INT4_ROWS(6, 1)
            }
        }
    }
}

/* `outputs` outputs for `rows` rows of x, `steps` vectors of a row of codes at once; all constants where inlined. */
INLINE void int8_tile(int rows, int outputs, int steps, const float *x, const int8_t *codes, float *y, int num_in,
                      int num_out) {
    vec sum[INT8_TILE][4];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < outputs * steps; n++) sum[m][n] = zero_vec();
    int k = 0;
    for (; k + steps * LANES <= num_in; k += steps * LANES)
        for (int n = 0; n < outputs; n++) {
            const int8_t *own = codes + (long)n * num_in + k;
            _mm_prefetch(own + PREFETCH, _MM_HINT_T0);
            for (int step = 0; step < steps; step++) {
                vec wide = to_float(load_signed(own + step * LANES));
                for (int m = 0; m < rows; m++) {
                    vec value = load_vec(x + (long)m * num_in + k + step * LANES);
                    sum[m][n * steps + step] = fmadd(value, wide, sum[m][n * steps + step]);
                }
            }
        }
    for (; k < num_in; k += LANES)
        for (int n = 0; n < outputs; n++) {
            vec wide = to_float(load_signed(codes + (long)n * num_in + k));
            for (int m = 0; m < rows; m++)
                sum[m][n * steps] = fmadd(load_vec(x + (long)m * num_in + k), wide, sum[m][n * steps]);
        }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < outputs; n++) {
            vec all = sum[m][n * steps];
            for (int step = 1; step < steps; step++) all = add(all, sum[m][n * steps + step]);
            y[(long)m * num_out + n] = add_up(all);
        }
}

/* Few rows take one output after the other, so that the codes are read in order: at M = 1 more than twice as fast. */
#define INT8_ROWS(R) \
    case R: \
        if (R <= 2) \
            for (int n = start; n < stop; n++) \
                int8_tile(R, 1, 4, x_rows, codes + (long)n * num_in, y_rows + n, num_in, num_out); \
        else if (stop - start == 4) \
            int8_tile(R, 4, 1, x_rows, codes + (long)start * num_in, y_rows + start, num_in, num_out); \
        else \
            for (int n = start; n < stop; n++) \
                int8_tile(R, 1, 1, x_rows, codes + (long)n * num_in, y_rows + n, num_in, num_out); \
        break;

/* x [rows, num_in] fp32, codes [num_out, num_in], num_in a multiple of 16, y [rows, num_out], not yet scaled. */
void int8_matmul(const float *x, int num_rows, const int8_t *codes, float *y, int num_in, int num_out) {
#pragma omp parallel for schedule(static)
    for (int tile = 0; tile < (num_out + 3) / 4; tile++) {
        int start = tile * 4, stop = start + 4 < num_out ? start + 4 : num_out;
        for (int first = 0; first < num_rows; first += INT8_TILE) {
            const float *x_rows = x + (long)first * num_in;
            float *y_rows = y + (long)first * num_out;
            switch (num_rows - first < INT8_TILE ? num_rows - first : INT8_TILE) {
                INT8_ROWS(1) INT8_ROWS(2) INT8_ROWS(3)
#if INT8_TILE == 6
                INT8_ROWS(4) INT8_ROWS(5) INT8_ROWS(6)
#endif
            }
        }
    }
}
