/* Arithmetic of kv_attention_bf16.c: eight queries, a tile, over at most CHUNK rows of bf16.
 *
 * Scores lie as [rows][LANES]: a query has a lane. So a product with a key is one broadcast of two channels and one dot
 * product of eight queries, and no sum across lanes. Weights go as pairs of rows [rows / 2][LANES]; values are paired
 * likewise, and outputs are vectors of 16 channels, of each query.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define LANES 8  /* queries of a tile */
#define GROUP 16 /* rows scored at once */
#define CHUNK 32 /* rows of one step of the softmax: one block of paged storage */

typedef __m512 vec;

INLINE __m256bh two_channels(const uint16_t *row) {
    int two;
    memcpy(&two, row, 4);
    return (__m256bh)_mm256_set1_epi32(two);
}

/* scores [rows][LANES] = scale (start + q k) of keys [rows, dim], at most GROUP, and a query [dim / 2][LANES] of pairs.
 * Meanwhile `later` is fetched, as many bytes as GROUP keys have, one of the 64-byte lines of each row after the other,
 * and every second one of `much_later`. The lines between are fetched with the values, which take less time: what is
 * asked for faster than memory answers is lost. */
INLINE void score_any(int dim, int rows, const uint16_t *key, const uint32_t *query, __m256 start, __m256 scale,
                      const char *later, const char *much_later, float *scores) {
    __m256 dot[GROUP];
    for (int r = 0; r < rows; r++) dot[r] = start;
    for (int i = 0; i < dim / 2; i++) {
        __m256bh part = (__m256bh)_mm256_loadu_si256((const __m256i *)(query + LANES * i));
        int line = i % GROUP * dim * 2 + i / GROUP * 64;
        _mm_prefetch(later + line, _MM_HINT_T1);
        if (i / GROUP % 2) _mm_prefetch(much_later + line, _MM_HINT_T1);
        for (int r = 0; r < rows; r++) dot[r] = _mm256_dpbf16_ps(dot[r], part, two_channels(key + r * dim + 2 * i));
    }
    for (int r = 0; r < rows; r++) _mm256_storeu_ps(scores + LANES * r, _mm256_mul_ps(dot[r], scale));
}

static void score_group(int dim, const uint16_t *key, const uint32_t *query, __m256 start, __m256 scale,
                        const char *later, const char *much_later, float *scores) {
    if (dim == 64) score_any(64, GROUP, key, query, start, scale, later, much_later, scores);
    else if (dim == 128) score_any(128, GROUP, key, query, start, scale, later, much_later, scores);
    else score_any(dim, GROUP, key, query, start, scale, later, much_later, scores);
}

#define SCORE(ROWS) \
    case ROWS: \
        score_any(dim, ROWS, key, query, start, scale, later, much_later, scores); \
        break;

/* The same for the last rows of a plane, an even number of them below GROUP. */
static __attribute__((noinline)) void score_last(int dim, int rows, const uint16_t *key, const uint32_t *query,
                                                 __m256 start, __m256 scale, const char *later,
                                                 const char *much_later, float *scores) {
    switch (rows) { SCORE(2) SCORE(4) SCORE(6) SCORE(8) SCORE(10) SCORE(12) SCORE(14) }
}

/* 2^x for x <= 0, relative error 1e-7; a NaN stays one. 2^x = 2^n (1 + r P(r)), P fitted on [-1/2, 1/2]. */
INLINE vec exp2_of(vec x) {
    x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x); /* this way round a NaN stays one */
    vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec r = _mm512_sub_ps(x, n), p = _mm512_set1_ps(1.3264729719e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6715126620e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5507337355e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022242085e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314697760e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), n);
}

INLINE vec from_bf16(const uint16_t *bits) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bits)), 16);
}

INLINE vec twice(__m256 lanes) { return _mm512_insertf32x8(_mm512_castps256_ps512(lanes), lanes, 1); }
INLINE __m256 upper(vec both) { return _mm512_extractf32x8_ps(both, 1); }
INLINE __m256 lower(vec both) { return _mm512_castps512_ps256(both); }

/* Four vectors of four quarters: quarter j of vector i becomes quarter i of vector j. */
INLINE void swap_quarters(vec *four) {
    vec low[2], high[2];
    for (int i = 0; i < 2; i++) {
        low[i] = _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x44);
        high[i] = _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xEE);
    }
    four[0] = _mm512_shuffle_f32x4(low[0], low[1], 0x88), four[1] = _mm512_shuffle_f32x4(low[0], low[1], 0xDD);
    four[2] = _mm512_shuffle_f32x4(high[0], high[1], 0x88), four[3] = _mm512_shuffle_f32x4(high[0], high[1], 0xDD);
}

/* rows [num][dim] -> columns [dim][LANES], 0 for rows that lack; dim a multiple of 16. What a lane holds does not matter. */
static void turn(int num, int dim, const void *const *rows, float *columns) {
    for (int d = 0; d < dim; d += 16, columns += 16 * LANES) {
        vec own[LANES], pairs[LANES], fours[2][4];
        for (int m = 0; m < LANES; m++) own[m] = m < num ? _mm512_loadu_ps((const float *)rows[m] + d) : _mm512_setzero_ps();
        for (int m = 0; m < LANES; m += 2) {
            pairs[m] = _mm512_unpacklo_ps(own[m], own[m + 1]);
            pairs[m + 1] = _mm512_unpackhi_ps(own[m], own[m + 1]);
        }
        for (int i = 0; i < 4; i++) { /* channel 4 j + i of rows 0 to 3 in quarter j, then of rows 4 to 7 */
            for (int half = 0; half < 2; half++) {
                __m512d one = (__m512d)pairs[half * 4 + i / 2], two = (__m512d)pairs[half * 4 + 2 + i / 2];
                __m512d both = i % 2 ? _mm512_unpackhi_pd(one, two) : _mm512_unpacklo_pd(one, two);
                fours[i / 2][i % 2 * 2 + half] = (vec)both;
            }
        }
        for (int i = 0; i < 2; i++) { /* channels 4 j + 2 i and the next one */
            swap_quarters(fours[i]);
            for (int j = 0; j < 4; j++) _mm512_storeu_ps(columns + (4 * j + 2 * i) * LANES, fours[i][j]);
        }
    }
}

/* -inf in place of the scores [rows][LANES] of rows that a query does not see: those from seen [LANES] on. */
static void hide(float *scores, int rows, __m256i seen) {
    for (int r = 0; r < rows; r++) {
        __mmask8 is_hidden = _mm256_cmple_epi32_mask(seen, _mm256_set1_epi32(r));
        _mm256_mask_storeu_ps(scores + LANES * r, is_hidden, _mm256_set1_ps(-INFINITY));
    }
}

/* 0 for -inf, so that subtracting it from -inf gives -inf. */
INLINE __m256 or_zero(__m256 base) {
    __mmask8 is_none = _mm256_cmp_ps_mask(base, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ);
    return _mm256_mask_blend_ps(is_none, base, _mm256_setzero_ps());
}

/* The largest score of each query. */
INLINE __m256 largest_of(const float *scores, int rows) {
    vec largest = _mm512_set1_ps(-INFINITY);
    for (int r = 0; r < rows; r += 2) largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + LANES * r));
    return _mm256_max_ps(lower(largest), upper(largest));
}

/* Scores become weights 2^(score - base). Returns their sums. `kept`, if any, gets them in fp16. */
INLINE __m256 soften(float *scores, int rows, __m256 base, uint16_t *kept) {
    vec bases = twice(or_zero(base)), sum = _mm512_setzero_ps();
    for (int r = 0; r < rows; r += 2) {
        vec weight = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + LANES * r), bases));
        _mm512_storeu_ps(scores + LANES * r, weight);
        sum = _mm512_add_ps(sum, weight);
        if (kept)
            _mm256_storeu_si256((__m256i *)(kept + LANES * r),
                                _mm512_cvtps_ph(weight, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    return _mm256_add_ps(lower(sum), upper(sum));
}

/* Adds neighbouring lanes of two vectors: quarter by quarter those of `one`, then those of `two`. */
INLINE vec add_neighbours(vec one, vec two) {
    return _mm512_add_ps(_mm512_shuffle_ps(one, two, 0x88), _mm512_shuffle_ps(one, two, 0xDD));
}

/* Sums [16] of the products of weights [16][LANES] in fp16 with shares [LANES]. */
INLINE vec shared_out(const uint16_t *kept, __m256 shares) {
    vec part[8], both = twice(shares);
    for (int i = 0; i < 8; i++)
        part[i] = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(kept + 16 * i))), both);
    for (int i = 0; i < 4; i++) part[i] = add_neighbours(part[2 * i], part[2 * i + 1]);
    for (int i = 0; i < 2; i++) part[i] = add_neighbours(part[2 * i], part[2 * i + 1]);
    vec sums = _mm512_add_ps(_mm512_shuffle_f32x4(part[0], part[1], 0x88), _mm512_shuffle_f32x4(part[0], part[1], 0xDD));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15), sums);
}

/* The same where only the first four lanes have a share. */
INLINE vec shared_out_of_four(const uint16_t *kept, __m256 shares) {
    const __m512i halves = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    vec part[4], all = _mm512_broadcast_f32x4(_mm256_castps256_ps128(shares));
    for (int i = 0; i < 2; i++) {
        __m512i first = _mm512_loadu_si512(kept + 64 * i), second = _mm512_loadu_si512(kept + 64 * i + 32);
        __m512i own = _mm512_permutex2var_epi64(first, halves, second); /* [8 rows][4] */
        part[2 * i] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(own)), all);
        part[2 * i + 1] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(own, 1)), all);
    }
    /* a quarter of part[i] is row 4 i + quarter; of the sum, quarter q has rows q, 4 + q, 8 + q, 12 + q */
    vec sums = add_neighbours(add_neighbours(part[0], part[1]), add_neighbours(part[2], part[3]));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums);
}

INLINE vec two_of(const float *one, const float *other) {
    return _mm512_mask_broadcastss_ps(_mm512_set1_ps(*one), 0xFF00, _mm_load_ss(other));
}

/* [LANES] of one row (or channel) and of the next as bf16 pairs. */
INLINE __m256i paired(vec both) {
    const __m256i order = _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    return _mm256_permutexvar_epi16(order, (__m256i)_mm512_cvtneps_pbh(both));
}

/* Weights [rows][LANES] as pairs of rows in bf16, times the rows' scales where they have some. */
INLINE void pair_up(const float *weights, int rows, const float *row_scale, uint32_t *pairs) {
    for (int r = 0; r < rows; r += 2) {
        vec both = _mm512_loadu_ps(weights + LANES * r);
        if (row_scale) both = _mm512_mul_ps(both, two_of(row_scale + r, row_scale + r + 1));
        _mm256_storeu_si256((__m256i *)(pairs + LANES / 2 * r), paired(both));
    }
}

/* Adds (pairs of weights) (values [rows, dim]) to out [2][LANES][16], 32 channels; in_order says what lies in the
 * vectors. `later`, a line of each row of each GROUP, is fetched meanwhile. Without the pragmas gcc 12 may unroll so late
 * that the sums stay in memory. */
INLINE void add_values(int num, int dim, const uint16_t *value, const char *const *later, int rows,
                       const uint32_t *pairs, float *out) {
    vec sum[LANES][2];
#pragma GCC unroll 8
    for (int m = 0; m < num; m++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) sum[m][half] = _mm512_loadu_ps(out + (half * LANES + m) * 16);
    const char *ahead = later[0];
    for (int r = 0; r < rows; r += 2, value += 2 * dim, pairs += LANES) {
        __m512i one = _mm512_loadu_si512(value), two = _mm512_loadu_si512(value + dim);
        __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, two), high = (__m512bh)_mm512_unpackhi_epi16(one, two);
        _mm_prefetch(ahead, _MM_HINT_T1);
        _mm_prefetch(ahead + 2 * dim, _MM_HINT_T1);
    #pragma GCC unroll 8
    for (int m = 0; m < num; m++) {
            __m512bh weight = (__m512bh)_mm512_set1_epi32((int)pairs[m]);
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], weight, low);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], weight, high);
        }
        ahead = r == GROUP - 2 ? later[1] : ahead + 4 * dim;
    }
    for (int r = rows; r % GROUP; r += 2, ahead += 4 * dim) {
        _mm_prefetch(ahead, _MM_HINT_T1);
        _mm_prefetch(ahead + 2 * dim, _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int m = 0; m < num; m++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(out + (half * LANES + m) * 16, sum[m][half]);
}

/* The 64 channels of four such vectors in order: lane i of vector v was channel v / 2 * 32 + i / 4 * 8 + v % 2 * 4 + i % 4. */
INLINE void in_order(vec *four) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int v = 0; v < 4; v += 2) {
        vec one = four[v], two = four[v + 1];
        four[v] = _mm512_permutex2var_ps(one, low, two), four[v + 1] = _mm512_permutex2var_ps(one, high, two);
    }
}

#define ADD_VALUES(N) \
    case N: \
        add_values(N, dim, value, later, rows, pairs, out); \
        break;

static void add_values_of(int num, int dim, const uint16_t *value, const char *const *later, int rows,
                          const uint32_t *pairs, float *out) {
    switch (num) {
        ADD_VALUES(1) ADD_VALUES(2) ADD_VALUES(3) ADD_VALUES(4) ADD_VALUES(5) ADD_VALUES(6) ADD_VALUES(7) ADD_VALUES(8)
    }
}
