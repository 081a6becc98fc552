/* Attention of output tokens over a KV cache, encoded or not, which is read as it is stored: no decoded copy.
 *
 * One (sequence, KV head) plane at a time and per thread. Its rows come in blocks of at most 32: keys of a block are
 * decoded into the L1 cache, all query rows of the plane (query group x tokens) are scored against them, then values:
 *
 *     s = scale q k            m' = max(m, s)        out = out exp(m - m') + exp(s - m') v       sum likewise
 *
 * so that each stored byte is loaded once for the whole query group. Scores, sums and outputs are fp32. head_dim is a
 * multiple of 8. 256-bit vectors and fp32 products, for every dtype and machine. Queries in bf16 on AVX-512 go to
 * kv_attention_bf16.c, which is compared with this.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kv_attention.h"

enum { INT8 = 0, FP8 = 1 };

INLINE float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE float add_up(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* e^x for x <= 0, 2 ulp; below -87 it is 0. Cephes' polynomial after x = n ln 2 + r. */
INLINE __m256 exp_of(__m256 x) {
    __m256 is_zero = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
    x = _mm256_max_ps(_mm256_set1_ps(-87.0f), x); /* this way round a NaN stays one */
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(p, r), r, r), _mm256_set1_ps(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(is_zero, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

/* Eight fp8 (e4m3) codes: moved into the places of an fp16, where they mean 2^-8 of their value, subnormals too. */
INLINE __m256 from_fp8(__m128i bytes) {
    __m128i wide = _mm_cvtepu8_epi16(bytes);
    __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    __m128i rest = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7F)), 7);
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), _mm256_set1_ps(256.0f));
}

/* `count` rows of one part, codes [count, dim] with a bf16 scale each, as fp32 [count, dim]. */
INLINE void decode_rows(int format, const uint8_t *codes, const uint16_t *scale, int count, int dim, float *rows) {
    for (int row = 0; row < count; row++) {
        __m256 step = _mm256_set1_ps(from_bf16(scale[row]));
        for (int d = 0; d < dim; d += 8) {
            __m128i eight = _mm_loadl_epi64((const __m128i *)(codes + (long)row * dim + d));
            __m256 wide = format == INT8 ? _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)) : from_fp8(eight);
            _mm256_storeu_ps(rows + row * dim + d, _mm256_mul_ps(wide, step));
        }
    }
}

/* Eight fp16 numbers. */
INLINE __m256 from_fp16(const uint16_t *bits) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)bits)); }

INLINE __m256 from_nibbles(__m128i bytes, int is_high) {
    if (is_high) bytes = _mm_srli_epi16(bytes, 4);
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(bytes, _mm_set1_epi8(15))));
}

/* `count` tokens of one group of int4 keys: codes [count, dim / 2], low halves first; step, low [dim] in fp16. */
INLINE void decode_int4_keys(const uint8_t *codes, const uint16_t *step, const uint16_t *low, int count, int dim,
                             float *rows) {
    int half = dim / 2;
    for (int d = 0; d < half; d += 8) {
        __m256 steps[2] = {from_fp16(step + d), from_fp16(step + half + d)};
        __m256 lows[2] = {from_fp16(low + d), from_fp16(low + half + d)};
        for (int row = 0; row < count; row++) {
            __m128i eight = _mm_loadl_epi64((const __m128i *)(codes + (long)row * half + d));
            for (int high = 0; high < 2; high++)
                _mm256_storeu_ps(rows + row * dim + high * half + d,
                                 _mm256_fmadd_ps(from_nibbles(eight, high), steps[high], lows[high]));
        }
    }
}

/* The same for values: step, low [count, dim / channels]; channels a multiple of 8. */
INLINE void decode_int4_values(const uint8_t *codes, const uint16_t *step, const uint16_t *low, int channels, int count,
                               int dim, float *rows) {
    int half = dim / 2, num_ranges = dim / channels;
    for (int row = 0; row < count; row++)
        for (int d = 0; d < half; d += 8) {
            __m128i eight = _mm_loadl_epi64((const __m128i *)(codes + (long)row * half + d));
            for (int high = 0; high < 2; high++) {
                int range = row * num_ranges + (high * half + d) / channels;
                __m256 value = _mm256_fmadd_ps(from_nibbles(eight, high), _mm256_set1_ps(_cvtsh_ss(step[range])),
                                               _mm256_set1_ps(_cvtsh_ss(low[range])));
                _mm256_storeu_ps(rows + row * dim + high * half + d, value);
            }
        }
}

INLINE void read_rows(int dtype, const char *rows, long first, int count, int dim, float *out) {
    const uint16_t *half = (const uint16_t *)rows + first * dim;
    if (dtype == FP32) memcpy(out, (const float *)rows + first * dim, sizeof(float) * count * dim);
    else if (dtype == FP16)
        for (int i = 0; i < count * dim; i += 8) _mm256_storeu_ps(out + i, from_fp16(half + i));
    else
        for (int i = 0; i < count * dim; i++) out[i] = from_bf16(half[i]);
}

/* One plane: what its queries ask, where a block goes, and what they have found so far. */
typedef struct {
    int num_queries, num_tokens, past, dim; /* query m is token m % num_tokens and sees rows up to past + that */
    long num_rows;                          /* stride of scores, a multiple of 8 */
    float scale;
    const float *query;                /* [num_queries, dim], copied together */
    float *key, *value;                /* [BLOCK, dim] */
    float *weight;                     /* [num_queries, BLOCK] */
    float *largest, *sum;              /* [num_queries] */
    float *scores;                     /* [num_queries, num_rows] of their own, or NULL */
    float *out;                        /* [num_queries, dim] */
    void *room;                        /* of all those above */
    float *columns;                    /* [num_tokens, call->num_rows] or NULL */
} Plane;

/* Scores of rows first .. first + count - 1, whose keys have been decoded; -inf for what a query does not see. */
INLINE void score_block(Plane *plane, long first, int count) {
    int dim = plane->dim;
    for (int m = 0; m < plane->num_queries; m++) {
        const float *query = plane->query + (long)m * dim;
        float *weight = plane->weight + m * BLOCK;
        for (int row = 0; row < count; row += 4) { /* rows past count hold an earlier block's and are hidden below */
            const float *key = plane->key + row * dim;
            __m256 dot[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int d = 0; d < dim; d += 8) {
                __m256 part = _mm256_loadu_ps(query + d);
                for (int i = 0; i < 4; i++) dot[i] = _mm256_fmadd_ps(part, _mm256_loadu_ps(key + i * dim + d), dot[i]);
            }
            for (int i = 0; i < 4; i++) weight[row + i] = plane->scale * add_up(dot[i]);
        }
        long seen = plane->past + m % plane->num_tokens + 1 - first;
        for (int row = seen < 0 ? 0 : seen < count ? (int)seen : count; row < BLOCK; row++) weight[row] = -INFINITY;
        if (plane->scores) memcpy(plane->scores + m * plane->num_rows + first, weight, count * sizeof(float));
    }
}

/* Turns the scores into weights and adds the block's values, decoded, to what was found. A NaN stays one. */
INLINE void add_block(Plane *plane, int count) {
    int dim = plane->dim;
    for (int m = 0; m < plane->num_queries; m++) {
        float *weight = plane->weight + m * BLOCK, largest = plane->largest[m];
        for (int row = 0; row < count; row++) largest = weight[row] > largest ? weight[row] : largest;
        float base = largest == -INFINITY ? 0 : largest; /* nothing seen yet: weights of 0 */
        float shrink = _mm256_cvtss_f32(exp_of(_mm256_set1_ps(plane->largest[m] - base)));
        __m256 sum = _mm256_setzero_ps();
        for (int row = 0; row < BLOCK; row += 8) {
            __m256 part = exp_of(_mm256_sub_ps(_mm256_loadu_ps(weight + row), _mm256_set1_ps(base)));
            _mm256_storeu_ps(weight + row, part);
            sum = _mm256_add_ps(sum, part);
        }
        plane->sum[m] = plane->sum[m] * shrink + add_up(sum);
        plane->largest[m] = largest;
        float *out = plane->out + (long)m * dim;
        int d = 0;
        for (; d + 32 <= dim; d += 32) {
            __m256 total[4];
            for (int i = 0; i < 4; i++)
                total[i] = _mm256_mul_ps(_mm256_loadu_ps(out + d + 8 * i), _mm256_set1_ps(shrink));
            for (int row = 0; row < count; row++) {
                const float *value = plane->value + row * dim + d;
                __m256 part = _mm256_broadcast_ss(weight + row);
                for (int i = 0; i < 4; i++) total[i] = _mm256_fmadd_ps(part, _mm256_loadu_ps(value + 8 * i), total[i]);
            }
            for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + d + 8 * i, total[i]);
        }
        for (; d < dim; d += 8) {
            __m256 total = _mm256_mul_ps(_mm256_loadu_ps(out + d), _mm256_set1_ps(shrink));
            for (int row = 0; row < count; row++)
                total = _mm256_fmadd_ps(_mm256_broadcast_ss(weight + row),
                                        _mm256_loadu_ps(plane->value + row * dim + d), total);
            _mm256_storeu_ps(out + d, total);
        }
    }
}

/* Rows row .. last - 1 of the plane, native ones. */
INLINE void attend_rows(Plane *plane, int dtype, const char *key, const char *value, Place place, int row, int last) {
    for (; row < last; row += BLOCK) {
        int count = last - row < BLOCK ? last - row : BLOCK;
        long first = stored_at(&place, row);
        read_rows(dtype, key, first, count, plane->dim, plane->key);
        score_block(plane, row, count);
        read_rows(dtype, value, first, count, plane->dim, plane->value);
        add_block(plane, count);
    }
}

/* What its queries ask, with room of its own; without memory `room` is NULL. */
INLINE Plane start(const Call *call, long index) {
    int num_tokens = tokens_of(call, index), num_queries = call->num_groups * num_tokens, dim = call->dim;
    long num_rows = (call->num_rows + 7L) / 8 * 8;
    long num_scores = call->columns || call->scores ? num_queries * num_rows : 0;
    long num_values = (long)num_queries * dim;
    float *room = malloc(sizeof(float) * (num_scores + BLOCK * (2L * dim + num_queries) + 2 * num_queries + 2 * num_values));
    float *key = room + num_scores, *largest = key + BLOCK * (2 * dim + num_queries);
    float *query = largest + 2 * num_queries;
    Plane plane = {
        .num_queries = num_queries,
        .num_tokens = num_tokens,
        .past = call->past[index],
        .dim = dim,
        .num_rows = num_rows,
        .scale = call->scale,
        .query = query,
        .key = key,
        .value = key + BLOCK * dim,
        .weight = key + 2 * BLOCK * dim,
        .largest = largest,
        .sum = largest + num_queries,
        .scores = num_scores ? room : NULL,
        .out = query + num_values,
        .columns = call->columns ? call->columns + index * num_tokens * call->num_rows : NULL,
        .room = room,
    };
    if (!room) return plane;
    for (int m = 0; m < num_queries; m++)
        memcpy(query + (long)m * dim, (const float *)call->query + query_at(call, index, m), sizeof(float) * dim);
    memset(plane.out, 0, sizeof(float) * num_values);
    for (int m = 0; m < num_queries; m++) plane.largest[m] = -INFINITY, plane.sum[m] = 0;
    for (long i = 0; i < num_scores; i++) plane.scores[i] = -INFINITY;
    return plane;
}

/* Weights of eight rows for query m, of which those of a token's queries make the mean. */
INLINE __m256 weights_of(const Plane *plane, int m, int row) {
    float share = plane->num_tokens / (plane->sum[m] * plane->num_queries);
    __m256 above = _mm256_sub_ps(_mm256_loadu_ps(plane->scores + m * plane->num_rows + row), _mm256_set1_ps(plane->largest[m]));
    return _mm256_mul_ps(exp_of(above), _mm256_set1_ps(share));
}

/* `scores` of the plane's rows, which get what the call asks for, or NULL. */
INLINE void finish(const Call *call, long index, Plane *plane, float *scores) {
    for (int m = 0; m < plane->num_queries; m++) {
        float *out = (float *)call->out + query_at(call, index, m);
        for (int d = 0; d < plane->dim; d++) out[d] = plane->out[(long)m * plane->dim + d] / plane->sum[m];
    }
    if (plane->columns) memset(plane->columns, 0, sizeof(float) * plane->num_tokens * call->num_rows);
    for (int m = 0; plane->columns && m < plane->num_queries; m++) {
        float *column = plane->columns + (long)(m % plane->num_tokens) * call->num_rows, weight[8];
        for (int row = 0; row < call->num_rows; row += 8) {
            _mm256_storeu_ps(weight, weights_of(plane, m, row));
            for (int i = 0; i < 8 && row + i < call->num_rows; i++) column[row + i] += weight[i];
        }
    }
    for (int row = 0; scores && row <= plane->past; row += 8) {
        __m256 sum = _mm256_setzero_ps();
        float weight[8];
        for (int m = 0; m < plane->num_queries; m++) sum = _mm256_add_ps(sum, weights_of(plane, m, row));
        _mm256_storeu_ps(weight, sum);
        for (int i = row; i < row + 8 && i <= plane->past; i++) scores[i] = scores[i] * call->decay + weight[i - row];
    }
    free(plane->room);
}

/* Rows that are encoded one by one: codes [B, H_kv, capacity, dim], scales [B, H_kv, capacity]; or both in blocks. */
INLINE int rows_of(int format, const Call *call, const Table *table, const uint8_t *key, const uint16_t *key_scale,
                    const uint8_t *value, const uint16_t *value_scale, int64_t capacity) {
    int lacks_memory = 0;
#pragma omp parallel for schedule(dynamic) num_threads(call->num_threads) reduction(| : lacks_memory)
    for (long index = 0; index < (long)call->num_slots * call->num_heads; index++) {
        Plane plane = start(call, index);
        if (!plane.room) {
            lacks_memory = 1;
            continue;
        }
        Place place = table ? in_blocks(call, table, index) : (Place){.first = index * capacity};
        int last = plane.past + plane.num_tokens;
        for (int row = 0; row < last; row += BLOCK) {
            int count = last - row < BLOCK ? last - row : BLOCK;
            long first = stored_at(&place, row);
            decode_rows(format, key + first * plane.dim, key_scale + first, count, plane.dim, plane.key);
            score_block(&plane, row, count);
            decode_rows(format, value + first * plane.dim, value_scale + first, count, plane.dim, plane.value);
            add_block(&plane, count);
        }
        finish(call, index, &plane, NULL);
    }
    return lacks_memory;
}

int attend_int8(const Call *call, const Table *table, const uint8_t *key, const uint16_t *key_scale,
                 const uint8_t *value, const uint16_t *value_scale, int64_t capacity) {
    return rows_of(INT8, call, table, key, key_scale, value, value_scale, capacity);
}

int attend_fp8(const Call *call, const Table *table, const uint8_t *key, const uint16_t *key_scale,
                const uint8_t *value, const uint16_t *value_scale, int64_t capacity) {
    return rows_of(FP8, call, table, key, key_scale, value, value_scale, capacity);
}

/* Tokens in int4 groups and the native rows after them. T encoded tokens have room, C rows.
 *
 *     encoded [B]                                 tokens of each sequence that lie in groups
 *     key_code, value_code [B, H_kv, T, dim / 2]
 *     key_step, key_low    [B, H_kv, T / group_size, dim]
 *     value_step, value_low [B, H_kv, T, dim / channels]
 *     key, value           [B, H_kv, C, dim] of `dtype`
 */
int attend_int4(const Call *call, const int32_t *encoded, const uint8_t *key_code, const uint16_t *key_step,
                 const uint16_t *key_low, const uint8_t *value_code, const uint16_t *value_step,
                 const uint16_t *value_low, const char *key, const char *value, int64_t num_tokens, int64_t num_rows,
                 int32_t group_size, int32_t channels, int32_t dtype) {
    int lacks_memory = 0;
#pragma omp parallel for schedule(dynamic) num_threads(call->num_threads) reduction(| : lacks_memory)
    for (long index = 0; index < (long)call->num_slots * call->num_heads; index++) {
        Plane plane = start(call, index);
        if (!plane.room) {
            lacks_memory = 1;
            continue;
        }
        int dim = plane.dim, num_encoded = encoded[index / call->num_heads];
        int last = plane.past + plane.num_tokens, step = group_size < BLOCK ? group_size : BLOCK;
        for (int row = 0; row < num_encoded; row += step) {
            long token = index * num_tokens + row, group = index * (num_tokens / group_size) + row / group_size;
            long range = token * (dim / channels);
            decode_int4_keys(key_code + token * dim / 2, key_step + group * dim, key_low + group * dim, step, dim,
                             plane.key);
            score_block(&plane, row, step);
            decode_int4_values(value_code + token * dim / 2, value_step + range, value_low + range, channels, step, dim,
                               plane.value);
            add_block(&plane, step);
        }
        Place place = {.first = index * num_rows - num_encoded};
        attend_rows(&plane, dtype, key, value, place, num_encoded, last);
        finish(call, index, &plane, NULL);
    }
    return lacks_memory;
}

/* Native rows of `dtype`: [B, H_kv, capacity, dim]; or those of each plane begin at first [B, H_kv], so that heads may
 * differ in length; or they lie in blocks. */
int attend_native(const Call *call, const Table *table, const int64_t *first, const char *key, const char *value,
                  int64_t capacity, int32_t dtype) {
    int lacks_memory = 0;
#pragma omp parallel for schedule(dynamic) num_threads(call->num_threads) reduction(| : lacks_memory)
    for (long index = 0; index < (long)call->num_slots * call->num_heads; index++) {
        Plane plane = start(call, index);
        if (!plane.room) {
            lacks_memory = 1;
            continue;
        }
        Place place = table ? in_blocks(call, table, index) : (Place){.first = first ? first[index] : index * capacity};
        attend_rows(&plane, dtype, key, value, place, 0, plane.past + plane.num_tokens);
        finish(call, index, &plane, call->scores ? call->scores + place.first : NULL);
    }
    return lacks_memory;
}
