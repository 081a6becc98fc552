/* Attention of output tokens over a KV cache, encoded or not, which is read as it is stored: no decoded copy.
 *
 * One (sequence, KV head) plane at a time and per thread. Its rows come in blocks of at most 32: keys of a block are
 * decoded into the L1 cache, all query rows of the plane (query group x tokens) are scored against them, then values:
 *
 *     s = scale q k            m' = max(m, s)        out = out exp(m - m') + exp(s - m') v       sum likewise
 *
 * so that each stored byte is loaded once for the whole query group. Scores, sums and outputs are fp32. head_dim is a
 * multiple of 8. 256-bit vectors, also where wider ones exist: it is decoding, not adding, that bounds this.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 32

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

/* Native rows; the numbers are those of kv_attention.py. */
enum { FP32 = 0, BF16 = 1, FP16 = 2 };

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
    long num_rows;                          /* stride of scores */
    float scale;
    const float *query;                /* [num_queries, dim] */
    float *key, *value;                /* [BLOCK, dim] */
    float *weight;                     /* [num_queries, BLOCK] */
    float *out, *scores;               /* [num_queries, dim]; [num_queries, num_rows] or NULL */
    float *largest, *sum;              /* [num_queries] */
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

/* Where the rows of a plane lie in a storage [.., dim]: one after the other, or in blocks of all KV heads. */
typedef struct {
    long first;                /* of rows one after the other */
    const int32_t *table;      /* or block ids: storage [num_blocks, num_heads, BLOCK, dim]; NULL without blocks */
    long head, num_heads;
} Place;

INLINE long stored_at(const Place *place, int row) {
    if (!place->table) return place->first + row;
    return (place->table[row / BLOCK] * place->num_heads + place->head) * BLOCK + row % BLOCK;
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

INLINE void start(Plane *plane) {
    memset(plane->out, 0, sizeof(float) * plane->num_queries * plane->dim);
    for (int m = 0; m < plane->num_queries; m++) plane->largest[m] = -INFINITY, plane->sum[m] = 0;
}

INLINE void finish(Plane *plane) {
    for (int m = 0; m < plane->num_queries; m++)
        for (int d = 0; d < plane->dim; d++) plane->out[(long)m * plane->dim + d] /= plane->sum[m];
}

/* The queries of a call and where its results go.
 *
 *     query, out [B, H_kv, M, dim]        scores [B, H_kv, M, num_rows] or NULL, of rows up to past + num_tokens - 1
 *     past [B, H_kv]                      largest, sum [B, H_kv, M]: a weight is e^(score - largest) / sum
 *     scratch [num_threads, 2 BLOCK dim + M BLOCK]
 */
typedef struct {
    const float *query;
    const int32_t *past;
    float *out, *scores, *largest, *sum, *scratch;
    int32_t num_slots, num_heads, num_queries, num_tokens, dim, num_rows, num_threads;
    float scale;
} Call;

INLINE Plane plane_of(const Call *call, long index) {
    float *key = call->scratch + omp_get_thread_num() * BLOCK * (2L * call->dim + call->num_queries);
    float *value = key + BLOCK * call->dim;
    return (Plane){
        .num_queries = call->num_queries,
        .num_tokens = call->num_tokens,
        .past = call->past[index],
        .dim = call->dim,
        .num_rows = call->num_rows,
        .scale = call->scale,
        .query = call->query + index * call->num_queries * call->dim,
        .key = key,
        .value = value,
        .weight = value + BLOCK * call->dim,
        .out = call->out + index * call->num_queries * call->dim,
        .scores = call->scores ? call->scores + index * call->num_queries * call->num_rows : NULL,
        .largest = call->largest + index * call->num_queries,
        .sum = call->sum + index * call->num_queries,
    };
}

/* Block tables of a call: those of (b, h) begin at b strides[0] + h strides[1]. */
typedef struct {
    const int32_t *ids;
    int64_t strides[2];
} Table;

INLINE Place in_blocks(const Call *call, const Table *table, long index) {
    long slot = index / call->num_heads, head = index % call->num_heads;
    return (Place){.table = table->ids + slot * table->strides[0] + head * table->strides[1],
                   .head = head,
                   .num_heads = call->num_heads};
}

/* Rows that are encoded one by one: codes [B, H_kv, capacity, dim], scales [B, H_kv, capacity]; or both in blocks. */
INLINE void rows_of(int format, const Call *call, const Table *table, const uint8_t *key, const uint16_t *key_scale,
                    const uint8_t *value, const uint16_t *value_scale, int64_t capacity) {
#pragma omp parallel for schedule(dynamic) num_threads(call->num_threads)
    for (long index = 0; index < (long)call->num_slots * call->num_heads; index++) {
        Plane plane = plane_of(call, index);
        Place place = table ? in_blocks(call, table, index) : (Place){.first = index * capacity};
        start(&plane);
        int last = plane.past + plane.num_tokens;
        for (int row = 0; row < last; row += BLOCK) {
            int count = last - row < BLOCK ? last - row : BLOCK;
            long first = stored_at(&place, row);
            decode_rows(format, key + first * plane.dim, key_scale + first, count, plane.dim, plane.key);
            score_block(&plane, row, count);
            decode_rows(format, value + first * plane.dim, value_scale + first, count, plane.dim, plane.value);
            add_block(&plane, count);
        }
        finish(&plane);
    }
}

void attend_int8(const Call *call, const Table *table, const uint8_t *key, const uint16_t *key_scale,
                 const uint8_t *value, const uint16_t *value_scale, int64_t capacity) {
    rows_of(INT8, call, table, key, key_scale, value, value_scale, capacity);
}

void attend_fp8(const Call *call, const Table *table, const uint8_t *key, const uint16_t *key_scale,
                const uint8_t *value, const uint16_t *value_scale, int64_t capacity) {
    rows_of(FP8, call, table, key, key_scale, value, value_scale, capacity);
}

/* Tokens in int4 groups and the native rows after them. T encoded tokens have room, C rows.
 *
 *     encoded [B]                                 tokens of each sequence that lie in groups
 *     key_code, value_code [B, H_kv, T, dim / 2]
 *     key_step, key_low    [B, H_kv, T / group_size, dim]
 *     value_step, value_low [B, H_kv, T, dim / channels]
 *     key, value           [B, H_kv, C, dim] of `dtype`
 */
void attend_int4(const Call *call, const int32_t *encoded, const uint8_t *key_code, const uint16_t *key_step,
                 const uint16_t *key_low, const uint8_t *value_code, const uint16_t *value_step,
                 const uint16_t *value_low, const char *key, const char *value, int64_t num_tokens, int64_t num_rows,
                 int32_t group_size, int32_t channels, int32_t dtype) {
#pragma omp parallel for schedule(dynamic) num_threads(call->num_threads)
    for (long index = 0; index < (long)call->num_slots * call->num_heads; index++) {
        Plane plane = plane_of(call, index);
        int dim = plane.dim, num_encoded = encoded[index / call->num_heads];
        int last = plane.past + plane.num_tokens, step = group_size < BLOCK ? group_size : BLOCK;
        start(&plane);
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
        finish(&plane);
    }
}

/* Native rows [.., dim] of `dtype`; those of each plane begin at first [B, H_kv], so heads may differ in length. */
void attend_native(const Call *call, const int64_t *first, const char *key, const char *value, int32_t dtype) {
#pragma omp parallel for schedule(dynamic) num_threads(call->num_threads)
    for (long index = 0; index < (long)call->num_slots * call->num_heads; index++) {
        Plane plane = plane_of(call, index);
        start(&plane);
        Place place = {.first = first[index]};
        attend_rows(&plane, dtype, key, value, place, 0, plane.past + plane.num_tokens);
        finish(&plane);
    }
}

/* Native rows in blocks [num_blocks, H_kv, BLOCK, dim]. */
void attend_paged(const Call *call, const Table *table, const char *key, const char *value, int32_t dtype) {
#pragma omp parallel for schedule(dynamic) num_threads(call->num_threads)
    for (long index = 0; index < (long)call->num_slots * call->num_heads; index++) {
        Plane plane = plane_of(call, index);
        start(&plane);
        attend_rows(&plane, dtype, key, value, in_blocks(call, table, index), 0, plane.past + plane.num_tokens);
        finish(&plane);
    }
}
