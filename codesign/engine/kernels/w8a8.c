/* 8-bit activations times 8-bit weights: tokens to codes, products, sums to outputs.
 *
 *     scale[m] = max |x[m]| / 127,   code = round(x / scale),   y = (sum of code products) scale[m] w_scale[n] + bias[n]
 *
 * Plain loops, which the compiler makes vector code of, but for the products. vpdpbusd multiplies unsigned by signed
 * bytes, so weights take part as code + 128, and 128 times the sum of x's codes is taken off again. Sums are exact.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { FP32, BF16 };

INLINE float load_value(const void *x, long i, int dtype) {
    if (dtype == FP32) return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bf16(float value) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t rounded = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;
}

INLINE void quantize_row(const void *x, int dtype, int8_t *codes, float *scale, int32_t *sum, long num_in) {
    uint32_t largest = 0; /* bits of floats that are not negative are ordered as the floats are */
    for (long k = 0; k < num_in; k++) {
        float value = load_value(x, k, dtype);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    float own;
    memcpy(&own, &largest, 4);
    own /= 127;
    *scale = own = own == 0 ? 1 : own;
    for (long k = 0; k < num_in; k++) codes[k] = (int8_t)(int)rintf(load_value(x, k, dtype) / own);
    int32_t total = 0;
    for (long k = 0; k < num_in; k++) total += codes[k];
    *sum = total;
}

/* x [rows, num_in] -> codes [rows, stride], scale [rows], sum of the codes [rows]. */
void quantize_rows(const void *x, int dtype, int8_t *codes, long stride, float *scale, int32_t *sum, long rows,
                   long num_in) {
#pragma omp parallel for schedule(static)
    for (long m = 0; m < rows; m++)
        if (dtype == FP32)
            quantize_row((const float *)x + m * num_in, FP32, codes + m * stride, scale + m, sum + m, num_in);
        else
            quantize_row((const uint16_t *)x + m * num_in, BF16, codes + m * stride, scale + m, sum + m, num_in);
}

INLINE void scale_row(const int32_t *sums, float row_scale, const float *w_scale, const float *bias, void *y, int dtype,
                      long at, long num_out) {
    for (long n = 0; n < num_out; n++) {
        float value = (float)sums[at + n] * row_scale * w_scale[n];
        if (bias) value += bias[n];
        if (dtype == FP32)
            ((float *)y)[at + n] = value;
        else
            ((uint16_t *)y)[at + n] = to_bf16(value);
    }
}

/* sums [rows, num_out] -> y [rows, num_out]; bias [num_out] or NULL. */
void scale_sums(const int32_t *sums, const float *scale, const float *w_scale, const float *bias, void *y, int dtype,
                long rows, long num_out) {
#pragma omp parallel for schedule(static)
    for (long m = 0; m < rows; m++)
        if (dtype == FP32)
            scale_row(sums, scale[m], w_scale, bias, y, FP32, m * num_out, num_out);
        else
            scale_row(sums, scale[m], w_scale, bias, y, BF16, m * num_out, num_out);
}

#ifdef __AVX512VNNI__
#include <immintrin.h>

#define TILE 8               /* rows of x at once, by what the registers hold beside two blocks of outputs */
#define PREFETCH 2048        /* bytes ahead of what is read */
#define X_BYTES (512 * 1024) /* of x at once: half of the L2 cache */

/* `count` blocks of 16 outputs for `rows` rows of x; both constants where inlined. */
INLINE void tile_sums(int rows, int count, const int8_t *x, long stride, const int32_t *x_sum, const uint8_t *blocks,
                      int32_t *sums, long num_in, long num_out) {
    __m512i sum[TILE][2];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < count; b++) sum[m][b] = _mm512_set1_epi32(-128 * x_sum[m]);
    for (long k = 0; k < num_in; k += 4) {
        __m512i own[2];
        for (int b = 0; b < count; b++) {
            const uint8_t *from = blocks + (b * num_in + k) * 16;
            _mm_prefetch(from + PREFETCH, _MM_HINT_T0);
            own[b] = _mm512_loadu_si512(from);
        }
        for (int m = 0; m < rows; m++) {
            int32_t four; /* x[m][k .. k + 3] */
            memcpy(&four, x + m * stride + k, 4);
            for (int b = 0; b < count; b++) sum[m][b] = _mm512_dpbusd_epi32(sum[m][b], own[b], _mm512_set1_epi32(four));
        }
    }
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < count; b++) _mm512_storeu_si512(sums + m * num_out + b * 16, sum[m][b]);
}

#define ROWS(R, COUNT) \
    case R: \
        tile_sums(R, COUNT, x + first * stride, stride, x_sum + first, blocks + n * num_in, sums + first * num_out + n, \
                  num_in, num_out); \
        break;
#define ALL_ROWS(COUNT) \
    ROWS(1, COUNT) ROWS(2, COUNT) ROWS(3, COUNT) ROWS(4, COUNT) ROWS(5, COUNT) ROWS(6, COUNT) ROWS(7, COUNT) ROWS(8, COUNT)

/* x [rows, stride] int8 with the sums of its rows, weights in blocks [num_out / 16, num_in / 4, 16, 4] of code + 128
 * -> sums [rows, num_out]. num_out a multiple of 16, num_in of 4. A few rows of x take one block at a time, so that the
 * weight is read in order. */
void block_sums(const int8_t *x, long stride, const int32_t *x_sum, const uint8_t *blocks, int32_t *sums, long rows,
                long num_in, long num_out) {
    long at_once = X_BYTES / num_in < TILE ? TILE : X_BYTES / num_in / TILE * TILE, count = rows <= 2 ? 1 : 2;
    for (long start = 0; start < rows; start += at_once) {
        long stop = start + at_once < rows ? start + at_once : rows;
#pragma omp parallel for schedule(static)
        for (long n = 0; n < num_out; n += 16 * count)
            for (long first = start; first < stop; first += TILE) {
                long tile = stop - first < TILE ? stop - first : TILE;
                if (count == 2 && n + 16 < num_out) switch (tile) { ALL_ROWS(2) }
                else switch (tile) { ALL_ROWS(1) }
            }
    }
}
#endif
