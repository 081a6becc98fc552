/* Attention of output tokens over a KV cache, on AVX-512 with BF16 and VNNI: what kv_attention.c does in 256 bits.
 *
 * In tiles of eight queries, CHUNK rows at a time. Native rows, fp8 and int4 codes are multiplied as bf16 with fp32 sums
 * (kv_attention_tile.h, kv_attention_decode.h), int8 codes as integers (kv_attention_digits.h). The rows of a (sequence,
 * KV head) plane are cut into parts of PART rows, so that long contexts keep every thread busy (kv_attention_parts.h);
 * each part keeps unnormalised outputs, the largest score and the sum of the weights, and in the end they become one:
 *
 *     base = max(base_p)      out = sum_p 2^(base_p - base) out_p / sum_p 2^(base_p - base) sum_p
 *
 * How rows are cut depends on lengths only, so the number of threads changes no bit. Scores count in powers of two.
 */
#include <omp.h>
#include <stdlib.h>

#include "kv_attention.h"
#include "kv_attention_tile.h"
#include "kv_attention_decode.h"
#include "kv_attention_digits.h"
#include "kv_attention_parts.h"

enum { NATIVE = 0, INT8 = 1, FP8 = 2, INT4 = 3 };

/* What is stored of the rows of a plane, the row at 0 of its place being the first of each pointer. */
typedef struct {
    const char *key, *value;                  /* rows or codes */
    const uint16_t *key_scale, *value_scale;  /* int8, fp8: bf16; int4: fp16 steps */
    const uint16_t *key_low, *value_low;      /* int4 */
    int group_size, channels;                 /* int4 */
} Stored;

/* Where a plane's rows lie, and those of the plane that is computed after it. */
typedef struct {
    Place place, next;
    int end, next_end; /* how many there are */
} Way;

/* Where to find what is computed in a while, the group at `row`, which may be past the end. */
INLINE long found_ahead(const Way *way, int row) {
    if (row < way->end) return stored_at(&way->place, row);
    row -= (way->end + GROUP - 1) / GROUP * GROUP;
    return stored_at(&way->next, row < way->next_end ? row : 0);
}

/* Scratch of one thread. */
typedef struct {
    _Alignas(64) float scores[CHUNK * LANES];
    uint32_t pairs[CHUNK / 2 * LANES]; /* of weights, or digits of them */
    float largest[LANES], steps[LANES]; /* of the weights of a chunk; what the digits count */
    float row_scale[2][CHUNK];
    uint16_t *rows[2];       /* [2, CHUNK, dim] of keys and of values: decoded ones; last ones, filled up with zeros */
    uint32_t *query;         /* [tiles, dim / 2, LANES] pairs of channels, or digits */
    float *query_steps;      /* [tiles, LANES] */
    int32_t *query_start;    /* [tiles, 2, LANES] */
    uint32_t *folded;        /* [dim / 2, LANES] */
    float *wide;             /* [tiles, dim, LANES] queries */
    float *wide_rows;        /* [LANES, dim] */
    float *key_range[2];     /* [dim] steps and middles of a group */
    float *value_range[2];   /* [CHUNK, dim / channels], at least 8 channels a range */
} Scratch;

/* One piece of memory for all of them; NULL: there is none. */
static char *scratch_of(const Call *call, Scratch *scratch) {
    int num_tiles = (call->num_groups * call->num_tokens + LANES - 1) / LANES; /* of the largest plane */
    size_t dim = call->dim, lanes = sizeof(float) * LANES;
    size_t sizes[] = {2 * lines(CHUNK * dim * 2),  2 * lines(CHUNK * dim * 2),    num_tiles * lines(dim / 2 * lanes),
                      lines(num_tiles * lanes),    lines(2 * num_tiles * lanes), lines(dim / 2 * lanes),
                      num_tiles * lines(dim * lanes), lines(dim * 4),            lines(dim * 4),
                      lines(CHUNK * dim / 8 * 4),  lines(CHUNK * dim / 8 * 4),  lines(dim * lanes)};
    void *parts[12];
    size_t total = 0;
    for (int i = 0; i < 12; i++) total += sizes[i];
    char *own = aligned_alloc(64, total), *next = own;
    for (int i = 0; i < 12; next += sizes[i++]) parts[i] = next;
    scratch->rows[0] = parts[0], scratch->rows[1] = parts[1], scratch->query = parts[2];
    scratch->query_steps = parts[3], scratch->query_start = parts[4], scratch->folded = parts[5];
    scratch->wide = parts[6], scratch->key_range[0] = parts[7], scratch->key_range[1] = parts[8];
    scratch->value_range[0] = parts[9], scratch->value_range[1] = parts[10], scratch->wide_rows = parts[11];
    return own;
}

/* The queries of a plane as the rows of `format` want them. */
static void prepare(int format, const Call *call, long plane, Scratch *scratch) {
    int dim = call->dim;
    for (int tile = 0; tile < tiles_of(call, plane); tile++) {
        uint32_t *own = scratch->query + (long)tile * dim / 2 * LANES;
        float *wide = scratch->wide + (long)tile * dim * LANES;
        int num = num_in(call, plane, tile);
        const void *rows[LANES];
        for (int m = 0; m < num; m++) rows[m] = (const uint16_t *)call->query + query_at(call, plane, tile * LANES + m);
        if (format == NATIVE || format == FP8) { /* pairs as they are */
            turn(num, dim / 2, rows, (float *)own);
            continue;
        }
        for (int m = 0; m < num; m++) {
            for (int d = 0; d < dim; d += 16)
                _mm512_storeu_ps(scratch->wide_rows + m * dim + d, from_bf16((const uint16_t *)rows[m] + d));
            rows[m] = scratch->wide_rows + m * dim;
        }
        if (format == INT8)
            query_digits(num, dim, scratch->wide_rows, own, scratch->query_steps + tile * LANES,
                         scratch->query_start + tile * 2 * LANES);
        else turn(num, dim, rows, wide);
        for (int d = 0; d < dim && format == INT4; d += 2)
            _mm256_storeu_si256((__m256i *)(own + d / 2 * LANES), paired(_mm512_loadu_ps(wide + d * LANES)));
    }
}

/* `rows` rows of `size` bytes from place on, `count` of them; if others lack, in `tail`, zeros for them. */
static const void *filled_up(const char *stored, long first, int count, int rows, long size, void *tail) {
    const char *from = stored + first * size;
    if (count == rows) return from;
    memcpy(tail, from, count * size);
    memset((char *)tail + count * size, 0, (rows - count) * size);
    return tail;
}

/* Turns the scores of a chunk of `rows` rows, filled up, into weights 2^(score - base), base the largest so far. Where
 * it grew, which becomes rare, what was found before is scaled. */
static void weigh(const Call *call, const Room *room, Scratch *scratch, long plane, int tile, int row, int rows,
                  Found *found) {
    int last = call->past[plane] + 1 - row; /* rows from here on are not seen by token 0 */
    if (rows > last) {
        int seen[LANES];
        for (int i = 0; i < LANES; i++) seen[i] = last + (tile * LANES + i) % tokens_of(call, plane);
        hide(scratch->scores, rows, _mm256_loadu_si256((const __m256i *)seen));
    }
    __m256 old = _mm256_loadu_ps(found->base), largest = largest_of(scratch->scores, rows);
    __m256 base = _mm256_max_ps(old, largest);
    _mm256_storeu_ps(scratch->largest, lower(exp2_of(_mm512_sub_ps(twice(largest), twice(or_zero(base))))));
    __m256 sum = _mm256_loadu_ps(found->sum);
    if (_mm256_cmp_ps_mask(base, old, _CMP_NEQ_UQ)) {
        float factor[16];
        vec shrink = exp2_of(_mm512_sub_ps(twice(old), twice(or_zero(base))));
        _mm512_storeu_ps(factor, shrink);
        sum = _mm256_mul_ps(sum, lower(shrink));
        for (int v = 0; v < room->num_vectors; v++)
            for (int m = 0; m < LANES; m++) {
                float *own = found->out + (v * LANES + m) * 16;
                _mm512_storeu_ps(own, _mm512_mul_ps(_mm512_loadu_ps(own), _mm512_set1_ps(factor[m])));
            }
        _mm256_storeu_ps(found->base, base);
    }
    uint16_t *kept = NULL;
    if (room->kept) {
        long chunk = (long)tile * room->num_chunks + row / CHUNK;
        kept = room->kept + chunk * CHUNK * LANES;
        _mm256_storeu_ps(room->chunk_base + chunk * LANES, base);
    }
    _mm256_storeu_ps(found->sum, _mm256_add_ps(sum, soften(scratch->scores, rows, base, kept)));
}

/* One chunk of rows for one tile: `key` and `value` as they are stored (int8) or as bf16, the next ones to be fetched. */
INLINE void attend_tile(int format, const Call *call, const Room *room, Scratch *scratch, long plane, int tile, int row,
                        int rows, const void *key, const void *value, const char *const *next_key,
                        const char *const *next_value, int channels) {
    int dim = call->dim, num = num_in(call, plane, tile), size = format == INT8 ? dim : 2 * dim;
    __m256 scale = _mm256_set1_ps(call->scale * 1.44269504f), start = _mm256_setzero_ps();
    const uint32_t *query = scratch->query + (long)tile * dim / 2 * LANES;
    Found *found = found_of(room, tile, row / PART);
    if (format == INT4) {
        const float *wide = scratch->wide + (long)tile * dim * LANES;
        start = fold_ranges(dim, wide, scratch->key_range[0], scratch->key_range[1], scratch->folded);
        query = scratch->folded;
    }
    if (format == INT8) scale = _mm256_mul_ps(scale, _mm256_loadu_ps(scratch->query_steps + tile * LANES));
    for (int first = 0; first < rows; first += GROUP) {
        const char *own = (const char *)key + (long)first * size, *later = next_key[first / GROUP];
        float *scores = scratch->scores + first * LANES;
        if (format == INT8)
            score_codes(dim, (const uint8_t *)own, scratch->row_scale[0] + first, query,
                        scratch->query_start + tile * 2 * LANES, scale, (const uint8_t *)later, scores);
        else if (format == NATIVE && rows - first < GROUP)
            score_last(dim, rows - first, (const uint16_t *)own, query, start, scale, later, next_value[first / GROUP],
                       scores);
        else
            score_group(dim, (const uint16_t *)own, query, start, scale, later,
                        format == NATIVE ? next_value[first / GROUP] : own, scores);
    }
    if (format == FP8)
        for (int r = 0; r < rows; r++) {
            __m256 own = _mm256_mul_ps(_mm256_loadu_ps(scratch->scores + LANES * r), _mm256_broadcast_ss(scratch->row_scale[0] + r));
            _mm256_storeu_ps(scratch->scores + LANES * r, own);
        }
    weigh(call, room, scratch, plane, tile, row, rows, found);
    if (format == INT8) {
        weight_digits(scratch->scores, rows, _mm256_loadu_ps(scratch->largest), scratch->row_scale[1], scratch->pairs,
                      scratch->steps);
        for (int d = 0; d < dim; d += 64) {
            const char *ahead[] = {next_value[0] + d, next_value[1] + d};
            add_codes_of(num, dim, (const uint8_t *)value + d, dim - d < 64 ? 0xFFFFFFFF : ~0ull, rows, scratch->pairs,
                         scratch->steps, ahead, found->out + d * LANES);
        }
        return;
    }
    if (format == INT4) {
        int half = dim / 2, num_ranges = dim / channels, known[2] = {-1, -1};
        _Alignas(32) float start[2][LANES];
        uint32_t pairs[2][CHUNK / 2 * LANES];
        for (int d = 0; d < half; d += 32) {
            for (int i = 0; i < 2; i++) {
                int range = (d + i * half) / channels;
                if (range == known[i]) continue;
                _mm256_store_ps(start[i], weigh_ranges(scratch->scores, rows, scratch->value_range[0] + range,
                                                       scratch->value_range[1] + range, num_ranges, pairs[i]));
                known[i] = range;
            }
            const uint32_t *own_pairs[2] = {pairs[0], pairs[1]};
            const float *own_start[2] = {start[0], start[1]};
            const char *ahead[] = {next_value[0] + d, next_value[1] + d};
            add_nibbles_of(num, dim, (const uint8_t *)value + d, ahead, rows, own_pairs, own_start,
                           found->out + d * LANES, found->out + (half + d) * LANES);
        }
        return;
    }
    pair_up(scratch->scores, rows, format == FP8 ? scratch->row_scale[1] : NULL, scratch->pairs);
    for (int d = 0; d < dim; d += 32) {
        int line = d / 64 * 128; /* each of them twice, since some are lost */
        const char *ahead[] = {next_value[0] + line, next_value[1] + line};
        add_values_of(num, dim, (const uint16_t *)value + d, ahead, rows, scratch->pairs, found->out + d * LANES);
    }
}

/* `count` rows of a plane from `row` on, CHUNK at most. */
INLINE void attend_chunk(int format, const Call *call, const Room *room, Scratch *scratch, long plane, const Way *way,
                         const Stored *stored, int row, int count) {
    int dim = call->dim, size = format == NATIVE ? 2 * dim : format == INT4 ? dim / 2 : dim;
    int whole = format == NATIVE ? 2 : GROUP, rows = (count + whole - 1) / whole * whole;
    /* Fetched meanwhile, a group of rows for each that is computed: the values of the next chunk and the keys of the
     * one after it. What is asked for later, or all at once, does not come in time. */
    long first = stored_at(&way->place, row), soon[2], then[2];
    for (int i = 0; i < 2; i++) {
        soon[i] = found_ahead(way, row + CHUNK + i * GROUP);
        then[i] = found_ahead(way, row + 2 * CHUNK + i * GROUP);
    }
    if (format == NATIVE && call->scores)
        for (int i = 0; i < CHUNK; i += 16) _mm_prefetch(call->scores + first + i, _MM_HINT_T1);
    const void *key = filled_up(stored->key, first, count, rows, size, scratch->rows[0] + CHUNK * dim);
    const void *value = filled_up(stored->value, first, count, rows, size, scratch->rows[1] + CHUNK * dim);
    const char *next_key[2], *next_value[2];
    for (int i = 0; i < 2; i++) {
        next_key[i] = stored->value + soon[i] * size;
        next_value[i] = stored->key + then[i] * size;
    }
    if (format == INT8 || format == FP8) {
        widen(0, stored->key_scale + first, count, rows, scratch->row_scale[0]);
        widen(0, stored->value_scale + first, count, rows, scratch->row_scale[1]);
        _mm_prefetch(stored->key_scale + then[0], _MM_HINT_T0);
        _mm_prefetch(stored->value_scale + then[0], _MM_HINT_T0);
    }
    if (format == INT8) {
        make_unsigned(key, rows * dim, (uint8_t *)scratch->rows[0]);
        key = scratch->rows[0];
    }
    if (format == FP8 || format == INT4) {
        const char *later[2] = {stored->key + then[0] * size, stored->value + then[0] * size};
        const void *codes[2] = {key, value};
        for (int i = 0; i < 2; i++) {
            if (format == INT4 && i == 0)
                decode_int4(codes[0], (const uint8_t *)later[0], rows, dim, scratch->rows[0]);
            if (format == FP8) decode_fp8(codes[i], (const uint8_t *)later[i], rows * dim, scratch->rows[i]);
        }
        key = scratch->rows[0];
        if (format == FP8) value = scratch->rows[1];
        for (int i = 0; i < 2; i++) { /* what is decoded by then need not be fetched */
            next_key[i] = key;
            next_value[i] = format == FP8 ? value : stored->value + then[i] * size;
        }
    }
    if (format == INT4) {
        int num_ranges = dim / stored->channels;
        long group = first / stored->group_size * dim, later = then[0] / stored->group_size * dim;
        widen_ranges(stored->key_scale + group, stored->key_low + group, dim, stored->key_scale + later,
                     stored->key_low + later, scratch->key_range);
        widen_ranges(stored->value_scale + first * num_ranges, stored->value_low + first * num_ranges,
                     rows * num_ranges, stored->value_scale + then[0] * num_ranges,
                     stored->value_low + then[0] * num_ranges, scratch->value_range);
    }
    for (int tile = 0; tile < tiles_of(call, plane); tile++)
        attend_tile(format, call, room, scratch, plane, tile, row, rows, key, value, next_key, next_value,
                    stored->channels);
}

/* Apart from whole chunks, whose loops are compiled for as many rows as these have. */
static __attribute__((noinline)) void attend_last(int format, const Call *call, const Room *room, Scratch *scratch,
                                                  long plane, const Way *way, const Stored *stored, int row, int count) {
    attend_chunk(format, call, room, scratch, plane, way, stored, row, count);
}

/* Rows row .. last - 1 of a plane, all in one part. */
INLINE void attend_rows(int format, const Call *call, const Room *room, Scratch *scratch, long plane, const Way *way,
                        const Stored *stored, int row, int last) {
    for (; row + CHUNK <= last; row += CHUNK)
        attend_chunk(format, call, room, scratch, plane, way, stored, row, CHUNK);
    if (row < last) attend_last(format, call, room, scratch, plane, way, stored, row, last - row);
}

INLINE Place place_of(const Call *call, const Table *table, const int64_t *first, int64_t capacity, long plane) {
    return table ? in_blocks(call, table, plane) : (Place){.first = first ? first[plane] : plane * capacity};
}

/* Which plane is the n-th to be computed: the last sequence first, since prompts, the longest pieces, come last in a
 * step, but its heads in the order in which they lie, so that memory is mostly read on and on. */
INLINE long turn_of(const Call *call, long n) {
    long slot = call->num_slots - 1 - n / call->num_heads;
    return slot < 0 ? 0 : slot * call->num_heads + n % call->num_heads;
}

/* All planes. Rows from num_encoded [B] on, all where it is NULL, are as `rest` says. 1: no memory. */
INLINE int attend(int format, const Call *call, const Table *table, const int64_t *first, const Stored *stored,
                  int64_t capacity, const int32_t *num_encoded, const Stored *rest, int64_t rest_capacity) {
    Rooms rooms;
    int lacks_memory = 0;
    if (!make_rooms(call, &rooms)) return 1;
    long num_planes = (long)call->num_slots * call->num_heads, begun = 0;
    long num_parts = (call->num_rows + PART - 1) / PART;
#pragma omp parallel num_threads(call->num_threads) reduction(| : lacks_memory)
    {
        Scratch scratch;
        char *own = scratch_of(call, &scratch);
        lacks_memory = !own;
        for (long item = 0; own;) {
#pragma omp atomic capture
            item = begun++;
            if (item >= num_planes * num_parts) break;
            long plane = turn_of(call, item / num_parts), after = turn_of(call, item / num_parts + 1);
            int part = item % num_parts, row = part * PART, end = call->past[plane] + tokens_of(call, plane), last = end;
            if (row >= last) continue;
            if (last > row + PART) last = row + PART;
            Room *room = enter(&rooms, plane);
            Way way = {.place = place_of(call, table, first, capacity, plane),
                       .next = place_of(call, table, first, capacity, after),
                       .end = end,
                       .next_end = call->past[after] + tokens_of(call, after)};
            prepare(format, call, plane, &scratch);
            start_part(call, room, plane, part);
            if (format == INT4) {
                int encoded = num_encoded[plane / call->num_heads], stop = encoded < last ? encoded : last;
                way.end = encoded, way.next_end = num_encoded[after / call->num_heads];
                attend_rows(INT4, call, room, &scratch, plane, &way, stored, row, stop);
                way.place.first = plane * rest_capacity - encoded, way.next.first = after * rest_capacity;
                way.end = end, way.next_end = rest_capacity;
                attend_rows(NATIVE, call, room, &scratch, plane, &way, rest, row > stop ? row : stop, last);
            } else attend_rows(format, call, room, &scratch, plane, &way, stored, row, last);
            if (!is_last(&rooms, plane)) continue;
            for (int tile = 0; tile < tiles_of(call, plane); tile++)
                merge(call, room, format == INT8, plane, tile, (end + PART - 1) / PART);
            if (call->columns) add_columns(call, room, plane, NULL);
            if (call->scores) add_columns(call, room, plane, call->scores + way.place.first);
            leave(&rooms, room);
        }
        free(own);
    }
    free(rooms.memory);
    return lacks_memory;
}

/* Native rows of bf16: [B, H_kv, capacity, dim]; or those of each plane begin at first [B, H_kv]; or lie in blocks. */
int attend_native(const Call *call, const Table *table, const int64_t *first, const char *key, const char *value,
                  int64_t capacity, int32_t dtype) {
    (void)dtype; /* bf16, like the queries */
    Stored stored = {.key = key, .value = value};
    return attend(NATIVE, call, table, first, &stored, capacity, NULL, NULL, 0);
}

/* Rows that are encoded one by one: codes [B, H_kv, capacity, dim], scales [B, H_kv, capacity]; or both in blocks. */
int attend_int8(const Call *call, const Table *table, const char *key, const uint16_t *key_scale, const char *value,
                const uint16_t *value_scale, int64_t capacity) {
    Stored stored = {.key = key, .value = value, .key_scale = key_scale, .value_scale = value_scale};
    return attend(INT8, call, table, NULL, &stored, capacity, NULL, NULL, 0);
}

int attend_fp8(const Call *call, const Table *table, const char *key, const uint16_t *key_scale, const char *value,
               const uint16_t *value_scale, int64_t capacity) {
    Stored stored = {.key = key, .value = value, .key_scale = key_scale, .value_scale = value_scale};
    return attend(FP8, call, table, NULL, &stored, capacity, NULL, NULL, 0);
}

/* Tokens in int4 groups and the native rows after them, as in kv_attention.c. */
int attend_int4(const Call *call, const int32_t *encoded, const char *key_code, const uint16_t *key_step,
                const uint16_t *key_low, const char *value_code, const uint16_t *value_step, const uint16_t *value_low,
                const char *key, const char *value, int64_t num_tokens, int64_t num_rows, int32_t group_size,
                int32_t channels, int32_t dtype) {
    (void)dtype;
    Stored rest = {.key = key, .value = value}, stored = {.key = key_code,
                                                          .value = value_code,
                                                          .key_scale = key_step,
                                                          .value_scale = value_step,
                                                          .key_low = key_low,
                                                          .value_low = value_low,
                                                          .group_size = group_size,
                                                          .channels = channels};
    return attend(INT4, call, NULL, NULL, &stored, num_tokens, encoded, &rest, num_rows);
}
