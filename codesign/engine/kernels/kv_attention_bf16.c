/* Attention of output tokens over a KV cache, on AVX-512 with BF16 and VNNI: what kv_attention.c does in 256 bits.
 *
 * Keys, queries, values and weights are multiplied as bf16 with fp32 sums, in tiles of eight queries (see
 * kv_attention_tile.h). The rows of a (sequence, KV head) plane are cut into parts of PART rows, so that long contexts
 * keep every thread busy; each part keeps unnormalised outputs, the largest score and the sum of the weights, and parts
 * are put together at the end:
 *
 *     base = max(base_p)      out = sum_p 2^(base_p - base) out_p / sum_p 2^(base_p - base) sum_p
 *
 * How rows are cut depends on lengths only, so the number of threads changes no bit. Scores count in powers of two.
 */
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "kv_attention.h"
#include "kv_attention_tile.h"

#define PART 1024 /* rows of one piece of work */

/* What one part found for one tile: base, sum [LANES], then vectors [dim / 16][LANES][16]. */
typedef struct {
    float base[LANES], sum[LANES];
    float out[];
} Found;

/* Memory of one call. Weights are kept only where columns are asked for: those of a chunk are 2^(base_of_chunk - base)
 * times what is kept. */
typedef struct {
    int num_tiles, num_parts, num_chunks; /* of the longest plane */
    size_t found_bytes;                   /* of one Found */
    char *found;                          /* [planes, tiles, parts] */
    uint16_t *kept;                       /* [planes, tiles, chunks CHUNK, LANES] */
    float *chunk_base;                    /* [planes, tiles, chunks, LANES] */
} Room;

static Found *found_of(const Room *room, long plane, int tile, int part) {
    return (Found *)(room->found + ((plane * room->num_tiles + tile) * room->num_parts + part) * room->found_bytes);
}

static int make_room(const Call *call, Room *room) {
    long num_planes = (long)call->num_slots * call->num_heads;
    room->num_tiles = (call->num_queries + LANES - 1) / LANES;
    room->num_parts = (call->num_rows + PART - 1) / PART;
    room->num_chunks = (call->num_rows + CHUNK - 1) / CHUNK;
    room->found_bytes = sizeof(Found) + sizeof(float) * LANES * call->dim;
    room->found = aligned_alloc(64, num_planes * room->num_tiles * room->num_parts * room->found_bytes);
    room->kept = NULL, room->chunk_base = NULL;
    if (!room->found) return 0;
    if (!call->columns) return 1;
    long num_kept = num_planes * room->num_tiles * room->num_chunks * LANES;
    room->chunk_base = malloc(num_kept * sizeof(float));
    room->kept = malloc(num_kept * CHUNK * sizeof(uint16_t));
    return room->chunk_base && room->kept;
}

static void give_back(Room *room) { free(room->found), free(room->kept), free(room->chunk_base); }

/* Where native rows are. */
typedef struct {
    const uint16_t *key, *value;
} Stored;

/* Scratch of one thread. */
typedef struct {
    _Alignas(64) float scores[CHUNK * LANES];
    uint32_t pairs[CHUNK / 2 * LANES];
    uint16_t *tail[2]; /* [GROUP, dim] of keys and of values: the last rows, filled up with zeros */
    uint32_t *query;   /* [tiles, dim / 2, LANES] pairs of channels */
} Scratch;

static uint32_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits >> 16; /* queries are bf16 that were widened */
}

static void pair_queries(const Call *call, long plane, int num_tiles, uint32_t *pairs) {
    int dim = call->dim;
    memset(pairs, 0, sizeof(uint32_t) * num_tiles * dim / 2 * LANES);
    for (int m = 0; m < call->num_queries; m++) {
        const float *query = call->query + (plane * call->num_queries + m) * dim;
        uint32_t *own = pairs + (long)(m / LANES) * dim / 2 * LANES + m % LANES;
        for (int i = 0; i < dim / 2; i++) own[i * LANES] = to_bf16(query[2 * i]) | to_bf16(query[2 * i + 1]) << 16;
    }
}

/* Pointers to groups of rows; the last one to `tail`, if rows lack. */
static void point(const uint16_t *rows, const Place *place, int row, int count, int dim, uint16_t *tail,
                  const uint16_t **groups) {
    for (int g = 0; g * GROUP < count; g++) {
        int rest = count - g * GROUP;
        groups[g] = rows + stored_at(place, row + g * GROUP) * dim;
        if (rest >= GROUP) continue;
        memcpy(tail, groups[g], sizeof(uint16_t) * rest * dim);
        memset(tail + rest * dim, 0, sizeof(uint16_t) * (GROUP - rest) * dim);
        groups[g] = tail;
    }
}

/* Turns the scores of a chunk of `rows` rows, filled up, into weights 2^(score - base), base the largest so far. Where
 * it grew, which becomes rare, what was found before is scaled. */
static void weigh(const Call *call, const Room *room, Scratch *scratch, long plane, int tile, int row, int rows,
                  Found *found) {
    int last = call->past[plane] + 1 - row; /* rows from here on are not seen by token 0 */
    if (rows > last) {
        int seen[LANES];
        for (int i = 0; i < LANES; i++) seen[i] = last + (tile * LANES + i) % call->num_tokens;
        hide(scratch->scores, rows, _mm256_loadu_si256((const __m256i *)seen));
    }
    __m256 old = _mm256_loadu_ps(found->base), base = _mm256_max_ps(old, largest_of(scratch->scores, rows));
    __m256 sum = _mm256_loadu_ps(found->sum);
    if (_mm256_cmp_ps_mask(base, old, _CMP_NEQ_UQ)) {
        float factor[16];
        vec shrink = exp2_of(_mm512_sub_ps(twice(old), twice(or_zero(base))));
        _mm512_storeu_ps(factor, shrink);
        sum = _mm256_mul_ps(sum, lower(shrink));
        for (int v = 0; v < call->dim / 16; v++)
            for (int m = 0; m < LANES; m++) {
                float *own = found->out + (v * LANES + m) * 16;
                _mm512_storeu_ps(own, _mm512_mul_ps(_mm512_loadu_ps(own), _mm512_set1_ps(factor[m])));
            }
        _mm256_storeu_ps(found->base, base);
    }
    uint16_t *kept = NULL;
    if (room->kept) {
        long chunk = (plane * room->num_tiles + tile) * room->num_chunks + row / CHUNK;
        kept = room->kept + chunk * CHUNK * LANES;
        _mm256_storeu_ps(room->chunk_base + chunk * LANES, base);
    }
    _mm256_storeu_ps(found->sum, _mm256_add_ps(sum, soften(scratch->scores, rows, base, kept)));
}

/* Rows row .. last - 1 of a plane, native ones. */
static void attend_part(const Call *call, const Room *room, Scratch *scratch, long plane, const Place *place,
                        Stored stored, int row, int last) {
    int dim = call->dim, part = row / PART;
    __m256 scale = _mm256_set1_ps(call->scale * 1.44269504f);
    for (int tile = 0; tile < room->num_tiles; tile++) {
        Found *found = found_of(room, plane, tile, part);
        memset(found, 0, room->found_bytes);
        for (int i = 0; i < LANES; i++) found->base[i] = -INFINITY;
    }
    const uint16_t *key[CHUNK / GROUP], *value[CHUNK / GROUP], *next[CHUNK / GROUP];
    for (; row < last; row += CHUNK) {
        int count = last - row < CHUNK ? last - row : CHUNK, num_groups = (count + GROUP - 1) / GROUP;
        point(stored.key, place, row, count, dim, scratch->tail[0], key);
        point(stored.value, place, row, count, dim, scratch->tail[1], value);
        for (int g = 0; g < num_groups; g++) {
            int later = row + CHUNK + g * GROUP;
            next[g] = stored.key + stored_at(place, later < last ? later : row) * dim;
        }
        for (int tile = 0; tile < room->num_tiles; tile++) {
            Found *found = found_of(room, plane, tile, part);
            const uint32_t *query = scratch->query + (long)tile * dim / 2 * LANES;
            int num = call->num_queries - tile * LANES < LANES ? call->num_queries - tile * LANES : LANES;
            for (int g = 0; g < num_groups; g++)
                score_group(dim, key[g], query, _mm256_setzero_ps(), scale, value[g], scratch->scores + g * GROUP * LANES);
            weigh(call, room, scratch, plane, tile, row, num_groups * GROUP, found);
            pair_up(scratch->scores, num_groups * GROUP, scratch->pairs);
            for (int d = 0; d < dim; d += 32) {
                const uint16_t *own[CHUNK / GROUP], *later[CHUNK / GROUP];
                for (int g = 0; g < num_groups; g++) own[g] = value[g] + d, later[g] = next[g] + d;
                add_values_of(num, dim, own, later, num_groups, scratch->pairs, found->out + d * LANES);
            }
        }
    }
}

/* Puts the parts of one tile together in the first of them, normalised, and writes its outputs. */
static void merge(const Call *call, const Room *room, long plane, int tile, int num_parts) {
    Found *all = found_of(room, plane, tile, 0);
    for (int i = 0; i < LANES && tile * LANES + i < call->num_queries; i++) {
        float base = -INFINITY, sum = 0, *out = call->out + (plane * call->num_queries + tile * LANES + i) * call->dim;
        for (int part = 0; part < num_parts; part++) base = fmaxf(base, found_of(room, plane, tile, part)->base[i]);
        for (int d = 0; d < call->dim; d++) out[d] = 0;
        for (int part = 0; part < num_parts; part++) {
            const Found *found = found_of(room, plane, tile, part);
            float factor = exp2f(found->base[i] - base);
            sum += factor * found->sum[i];
            for (int v = 0; v < call->dim / 16; v++)
                for (int lane = 0; lane < 16; lane++)
                    out[channel_of(v, lane)] += factor * found->out[(v * LANES + i) * 16 + lane];
        }
        for (int d = 0; d < call->dim; d++) out[d] /= sum;
        all->base[i] = base, all->sum[i] = sum;
    }
}

/* Columns of rows row .. last - 1 of a plane. */
static void add_columns(const Call *call, const Room *room, long plane, int row, int last) {
    float *column = call->columns + plane * call->num_tokens * call->num_rows;
    int seen = call->past[plane] + call->num_tokens, num_rows = call->num_rows;
    for (int token = 0; token < call->num_tokens; token++)
        memset(column + (long)token * num_rows + row, 0, sizeof(float) * (last - row));
    for (int tile = 0; tile < room->num_tiles; tile++) {
        const Found *all = found_of(room, plane, tile, 0);
        int num = call->num_queries - tile * LANES < LANES ? call->num_queries - tile * LANES : LANES;
        for (int first = row; first < last && first < seen; first += CHUNK) {
            long chunk = (plane * room->num_tiles + tile) * room->num_chunks + first / CHUNK;
            float share[LANES] = {0};
            for (int i = 0; i < num; i++)
                share[i] = exp2f(room->chunk_base[chunk * LANES + i] - all->base[i]) * call->num_tokens /
                           (all->sum[i] * call->num_queries);
            for (int token = 0; token < call->num_tokens; token++) {
                __mmask8 own = 0;
                for (int i = 0; i < num; i++) own |= ((tile * LANES + i) % call->num_tokens == token) << i;
                __m256 shares = _mm256_maskz_loadu_ps(own, share);
                for (int r = first; r < first + CHUNK && r < seen; r += 16) {
                    float *to = column + (long)token * num_rows + r;
                    __mmask16 is_seen = seen - r < 16 ? (1 << (seen - r)) - 1 : 0xFFFF;
                    vec sums = shared_out(room->kept + (chunk * CHUNK + r - first) * LANES, shares);
                    _mm512_mask_storeu_ps(to, is_seen, _mm512_add_ps(_mm512_maskz_loadu_ps(is_seen, to), sums));
                }
            }
        }
    }
}

/* Native rows [.., dim] of bf16: those of each plane begin at first [B, H_kv], or lie in blocks. 1: no memory. */
int attend_native(const Call *call, const Table *table, const int64_t *first, const uint16_t *key,
                  const uint16_t *value, int32_t dtype) {
    (void)dtype;
    Room room;
    int lacks_memory = !make_room(call, &room), dim = call->dim;
    long num_planes = (long)call->num_slots * call->num_heads, num_items = num_planes * room.num_parts;
#pragma omp parallel num_threads(call->num_threads) reduction(| : lacks_memory) if (!lacks_memory)
    if (!lacks_memory) {
        Scratch scratch;
        char *own = aligned_alloc(64, (room.num_tiles * dim / 2L * LANES * 4 + 2L * GROUP * dim * 2 + 63) / 64 * 64);
        scratch.query = (uint32_t *)own;
        scratch.tail[0] = (uint16_t *)(own + room.num_tiles * dim / 2L * LANES * 4);
        scratch.tail[1] = scratch.tail[0] + GROUP * dim;
        lacks_memory = !own;
#pragma omp for schedule(dynamic)
        for (long item = 0; item < num_items; item++) {
            long plane = item / room.num_parts;
            int row = item % room.num_parts * PART, last = call->past[plane] + call->num_tokens;
            if (row >= last || !own) continue;
            Place place = table ? in_blocks(call, table, plane) : (Place){.first = first[plane]};
            pair_queries(call, plane, room.num_tiles, scratch.query);
            attend_part(call, &room, &scratch, plane, &place, (Stored){key, value}, row,
                        last < row + PART ? last : row + PART);
        }
#pragma omp for schedule(dynamic)
        for (long plane = 0; plane < num_planes; plane++)
            for (int tile = 0; tile < room.num_tiles; tile++)
                merge(call, &room, plane, tile, (call->past[plane] + call->num_tokens + PART - 1) / PART);
        if (call->columns) {
#pragma omp for schedule(dynamic)
            for (long item = 0; item < num_items; item++) {
                int row = item % room.num_parts * PART;
                add_columns(call, &room, item / room.num_parts, row,
                            row + PART < call->num_rows ? row + PART : call->num_rows);
            }
        }
        free(own);
    }
    give_back(&room);
    return lacks_memory;
}
