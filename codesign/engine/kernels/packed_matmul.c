/* y = x Wt for few rows of x and a W of packed int4 or int8 codes, on AVX2.
 *
 * ATen's AVX2 kernels for these weights run at 5-6 weights a nanosecond and core whatever the bits, bound by unpacking.
 * Here a code is scaled once per group and not once per weight:
 *
 *     y[m][n] = sum over groups g:  scale[g][n] * (sum over k in g: x[m][k] code[n][k])  +  middle[g][n] * sum x[m][k]
 *
 * so that the inner loop is one widening, one conversion and one FMA per eight weights and row of x, and rows of x are
 * taken several at a time to share the unpacking. All sums are fp32.
 *
 * int4 weights are in ATen's AVX2 order: blocks of 32 outputs, [in, 16] bytes each, low nibbles outputs 0..15, high
 * nibbles outputs 16..31. scale_and_zero is [groups, out, 2] in bf16 or fp16, for w = (code - 8) scale + zero.
 * int8 weights are [out, in]; the caller scales its outputs.
 */
#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

/* Eight (scale, zero) pairs of 16 bits each; middle = zero - 8 scale. */
INLINE void load_scales(const uint16_t *pairs, int is_half, __m256 *scale, __m256 *middle) {
    __m256i both = _mm256_loadu_si256((const __m256i *)pairs);
    __m256 zero;
    if (is_half) {
        __m256i low = _mm256_and_si256(both, _mm256_set1_epi32(0xFFFF)), high = _mm256_srli_epi32(both, 16);
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
        *scale = _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
        zero = _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1));
    } else {
        *scale = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        zero = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xFFFF0000)));
    }
    *middle = _mm256_fnmadd_ps(*scale, _mm256_set1_ps(8.0f), zero);
}

/* Outputs c..c+7 and c+16..c+23 of one block, for `rows` rows of x; rows is a constant where this is inlined. */
INLINE void int4_half_block(int rows, const float *x, const float *group_sums, const uint8_t *block, int c,
                            const uint16_t *pairs, int is_half, float *y, int num_in, int num_out, int group_size) {
    const __m256i mask = _mm256_set1_epi32(15);
    int num_groups = num_in / group_size;
    __m256 total[6][2];
    for (int m = 0; m < rows; m++) total[m][0] = total[m][1] = _mm256_setzero_ps();
    for (int g = 0; g < num_groups; g++) {
        /* two partial sums a row where there are few rows: an FMA takes four cycles and two can start in each */
        __m256 sum[6][2], other[2][2];
        for (int m = 0; m < rows; m++) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
        for (int m = 0; m < 2; m++) other[m][0] = other[m][1] = _mm256_setzero_ps();
        for (int k = g * group_size; k < (g + 1) * group_size; k += 2) {
            for (int step = 0; step < 2; step++) {
                __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(block + (k + step) * 16 + c)));
                __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(codes, mask));
                __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(codes, 4));
                for (int m = 0; m < rows; m++) {
                    __m256 value = _mm256_broadcast_ss(x + (long)m * num_in + k + step);
                    if (rows <= 2 && step) {
                        other[m][0] = _mm256_fmadd_ps(value, low, other[m][0]);
                        other[m][1] = _mm256_fmadd_ps(value, high, other[m][1]);
                    } else {
                        sum[m][0] = _mm256_fmadd_ps(value, low, sum[m][0]);
                        sum[m][1] = _mm256_fmadd_ps(value, high, sum[m][1]);
                    }
                }
            }
        }
        __m256 scale, middle;
        for (int half = 0; half < 2; half++) {
            load_scales(pairs + ((long)g * num_out + c + 16 * half) * 2, is_half, &scale, &middle);
            for (int m = 0; m < rows; m++) {
                if (rows <= 2) sum[m][half] = _mm256_add_ps(sum[m][half], other[m][half]);
                total[m][half] = _mm256_fmadd_ps(scale, sum[m][half], total[m][half]);
                total[m][half] =
                    _mm256_fmadd_ps(middle, _mm256_broadcast_ss(group_sums + (long)m * num_groups + g), total[m][half]);
            }
        }
    }
    for (int m = 0; m < rows; m++) {
        _mm256_storeu_ps(y + (long)m * num_out + c, total[m][0]);
        _mm256_storeu_ps(y + (long)m * num_out + c + 16, total[m][1]);
    }
}

#define INT4_ROWS(R) \
    case R: \
        int4_half_block(R, x_rows, sums, block, c, pairs, is_half, y_rows, num_in, num_out, group_size); \
        break;

/* x [rows, num_in] fp32, packed [num_out / 32][num_in][16], group_sums [rows, groups] scratch, y [rows, num_out]. */
void int4_matmul(const float *x, int num_rows, const uint8_t *packed, const uint16_t *scale_and_zero, int is_half,
                 float *group_sums, float *y, int num_in, int num_out, int group_size) {
    int num_groups = num_in / group_size;
    for (long i = 0; i < (long)num_rows * num_groups; i++) {
        float sum = 0;
        for (int k = 0; k < group_size; k++) sum += x[i * group_size + k];
        group_sums[i] = sum;
    }
#pragma omp parallel for schedule(static)
    for (int b = 0; b < num_out / 32; b++) {
        const uint8_t *block = packed + (long)b * num_in * 16;
        const uint16_t *pairs = scale_and_zero + (long)b * 64;
        for (int first = 0; first < num_rows; first += 6) {
            int rows = num_rows - first < 6 ? num_rows - first : 6;
            const float *x_rows = x + (long)first * num_in, *sums = group_sums + (long)first * num_groups;
            float *y_rows = y + (long)first * num_out + b * 32;
            for (int c = 0; c < 16; c += 8) switch (rows) {
                    INT4_ROWS(1) INT4_ROWS(2) INT4_ROWS(3) INT4_ROWS(4) INT4_ROWS(5) INT4_ROWS(6)
                }
        }
    }
}

INLINE float add_up(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* `outputs` outputs for `rows` rows of x; both constants where this is inlined. */
INLINE void int8_tile(int rows, int outputs, const float *x, const int8_t *codes, float *y, int num_in, int num_out) {
    __m256 sum[3][4];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < outputs; n++) sum[m][n] = _mm256_setzero_ps();
    for (int k = 0; k < num_in; k += 8)
        for (int n = 0; n < outputs; n++) {
            __m128i eight = _mm_loadl_epi64((const __m128i *)(codes + (long)n * num_in + k));
            __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
            for (int m = 0; m < rows; m++)
                sum[m][n] = _mm256_fmadd_ps(_mm256_loadu_ps(x + (long)m * num_in + k), wide, sum[m][n]);
        }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < outputs; n++) y[(long)m * num_out + n] = add_up(sum[m][n]);
}

#define INT8_ROWS(R, N) \
    case R: \
        int8_tile(R, N, x + (long)first * num_in, codes + (long)n * num_in, y + (long)first * num_out + n, num_in, \
                  num_out); \
        break;

/* x [rows, num_in] fp32, codes [num_out, num_in], num_in a multiple of 8, y [rows, num_out], not yet scaled. */
void int8_matmul(const float *x, int num_rows, const int8_t *codes, float *y, int num_in, int num_out) {
#pragma omp parallel for schedule(static)
    for (int tile = 0; tile < (num_out + 3) / 4; tile++) {
        int n = tile * 4;
        for (int first = 0; first < num_rows; first += 3) {
            int rows = num_rows - first < 3 ? num_rows - first : 3;
            if (num_out - n >= 4) {
                switch (rows) { INT8_ROWS(1, 4) INT8_ROWS(2, 4) INT8_ROWS(3, 4) }
            } else {
                for (; n < num_out; n++) switch (rows) { INT8_ROWS(1, 1) INT8_ROWS(2, 1) INT8_ROWS(3, 1) }
                n = tile * 4;
            }
        }
    }
}
