/* 8-bit activations times 8-bit weights: tokens to codes, products of few rows, sums to outputs.
 *
 *     scale[m] = max |x[m]| / 127,   code = round(x / scale),   y = (sum of code products) scale[m] w_scale[n] + bias[n]
 *
 * Plain loops, which the compiler makes vector code of, but for the products: vpdpbusd multiplies unsigned by signed
 * bytes, so x takes part as code + 128 and 128 times the sum of the weight's codes is taken off again. Sums are exact.
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

INLINE void quantize_row(const void *x, int dtype, int8_t *codes, float *scale, long at, long num_in) {
    uint32_t largest = 0; /* bits of floats that are not negative are ordered as the floats are */
    for (long k = 0; k < num_in; k++) {
        float value = load_value(x, at + k, dtype);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    float own;
    memcpy(&own, &largest, 4);
    own /= 127;
    *scale = own = own == 0 ? 1 : own;
    for (long k = 0; k < num_in; k++) codes[at + k] = (int8_t)(int)rintf(load_value(x, at + k, dtype) / own);
}

/* x [rows, num_in] -> codes [rows, num_in], scale [rows]. */
void quantize_rows(const void *x, int dtype, int8_t *codes, float *scale, long rows, long num_in) {
#pragma omp parallel for schedule(static)
    for (long m = 0; m < rows; m++)
        if (dtype == FP32)
            quantize_row(x, FP32, codes, scale + m, m * num_in, num_in);
        else
            quantize_row(x, BF16, codes, scale + m, m * num_in, num_in);
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

#define TILE 8        /* rows of x at once, by what the registers hold */
#define PREFETCH 2048 /* bytes ahead of what is read */

/* 64 codes of a row of the weight into the sums; `mask` of those that are there. */
INLINE void add_products(int rows, const int8_t *x, const int8_t *codes, __mmask64 mask, __m512i *sum,
                         __m512i *code_sum, long num_in) {
    const __m512i middle = _mm512_set1_epi8((char)128);
    __m512i own = _mm512_maskz_loadu_epi8(mask, codes);
    *code_sum = _mm512_dpbusd_epi32(*code_sum, middle, own);
    for (int m = 0; m < rows; m++) {
        __m512i row = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x + m * num_in), middle);
        sum[m] = _mm512_dpbusd_epi32(sum[m], row, own);
    }
}

INLINE void tile_sums(int rows, const int8_t *x, const int8_t *codes, int32_t *sums, long num_in, long num_out) {
    __m512i sum[TILE], code_sum = _mm512_setzero_si512();
    for (int m = 0; m < rows; m++) sum[m] = _mm512_setzero_si512();
    long k = 0;
    for (; k + 64 <= num_in; k += 64) {
        _mm_prefetch(codes + k + PREFETCH, _MM_HINT_T0);
        add_products(rows, x + k, codes + k, ~0ull, sum, &code_sum, num_in);
    }
    if (k < num_in) add_products(rows, x + k, codes + k, (1ull << (num_in - k)) - 1, sum, &code_sum, num_in);
    for (int m = 0; m < rows; m++)
        sums[m * num_out] = _mm512_reduce_add_epi32(_mm512_sub_epi32(sum[m], code_sum));
}

#define ROWS(R) \
    case R: tile_sums(R, x + first * num_in, codes + n * num_in, sums + first * num_out + n, num_in, num_out); break;

/* x [rows, num_in] and codes [num_out, num_in] int8 -> sums [rows, num_out]. One output after the other, so that the
 * codes are read in order: two at once take half as long again at M = 1. */
void few_row_sums(const int8_t *x, const int8_t *codes, int32_t *sums, long rows, long num_in, long num_out) {
#pragma omp parallel for schedule(static)
    for (long n = 0; n < num_out; n++)
        for (long first = 0; first < rows; first += TILE) switch (rows - first < TILE ? rows - first : TILE) {
                ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8)
            }
}
#endif
