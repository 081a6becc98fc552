/* Parts of kv_attention_bf16.c: what each finds, and how they are put together, after kv_attention_digits.h. */
#include <stdlib.h>

#define PART 1024 /* rows of one piece of work */

/* What one part found for one tile; out is [num_vectors][LANES][16]. */
typedef struct {
    float base[LANES], sum[LANES];
    float out[];
} Found;

/* Memory of one plane. Weights are kept only where they are asked for: those of a chunk are 2^(base_of_chunk - base)
 * times what is kept. */
typedef struct {
    int num_tiles, num_parts, num_chunks; /* of the largest plane */
    int num_vectors;
    size_t found_bytes; /* of one Found */
    char *found;        /* [tiles, parts] */
    uint16_t *kept;     /* [tiles, chunks CHUNK, LANES] */
    float *chunk_base;  /* [tiles, chunks, LANES] */
} Room;

/* Rooms of a call. Parts are begun in order, so that besides the planes that the threads are at only one can be half
 * done: a room more than there are threads is enough. Few rooms, used again and again, stay in the caches, where those
 * of all planes would be read from memory and written to it beside the rows. */
typedef struct {
    int num_free;
    Room **free;     /* [num_threads + 1] */
    Room **of_plane; /* [planes], NULL before its first part */
    int *num_left;   /* [planes] parts that are not done */
    char *memory;
} Rooms;

/* Tiles of the queries of a plane. */
static int tiles_of(const Call *call, long plane) {
    return (call->num_groups * tokens_of(call, plane) + LANES - 1) / LANES;
}

static Found *found_of(const Room *room, int tile, int part) {
    return (Found *)(room->found + (long)(tile * room->num_parts + part) * room->found_bytes);
}

static size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* 0: no memory. */
static int make_rooms(const Call *call, Rooms *rooms) {
    long num_planes = (long)call->num_slots * call->num_heads, num_rooms = call->num_threads + 1;
    if (num_rooms > num_planes) num_rooms = num_planes;
    Room room = {.num_tiles = (call->num_groups * call->num_tokens + LANES - 1) / LANES,
                 .num_parts = (call->num_rows + PART - 1) / PART,
                 .num_chunks = (call->num_rows + CHUNK - 1) / CHUNK,
                 .num_vectors = (call->dim + 63) / 64 * 4};
    room.found_bytes = sizeof(Found) + sizeof(float) * LANES * 16 * room.num_vectors;
    long num_kept = call->columns || call->scores ? (long)room.num_tiles * room.num_chunks * LANES : 0;
    size_t found = lines((long)room.num_tiles * room.num_parts * room.found_bytes), bases = lines(num_kept * sizeof(float));
    size_t kept = lines(num_kept * CHUNK * sizeof(uint16_t)), own = lines(sizeof(Room)) + found + bases + kept;
    size_t pointers = lines(num_planes * sizeof(Room *)), counts = lines(num_planes * sizeof(int));
    size_t listed = lines(num_rooms * sizeof(Room *)), total = listed + pointers + counts + num_rooms * own;
    char *next = rooms->memory = aligned_alloc(64, total);
    if (!next) return 0;
    rooms->free = (Room **)next, next += listed;
    rooms->of_plane = (Room **)next, next += pointers;
    rooms->num_left = (int *)next, next += counts;
    for (rooms->num_free = 0; rooms->num_free < num_rooms; rooms->num_free++, next += own) {
        Room *each = rooms->free[rooms->num_free] = (Room *)next;
        *each = room, each->found = next + lines(sizeof(Room));
        if (!num_kept) continue;
        each->chunk_base = (float *)(each->found + found);
        each->kept = (uint16_t *)(each->found + found + bases);
    }
    for (long plane = 0; plane < num_planes; plane++) {
        rooms->of_plane[plane] = NULL;
        rooms->num_left[plane] = (call->past[plane] + tokens_of(call, plane) + PART - 1) / PART;
    }
    return 1;
}

/* The room of a plane of which a part begins. */
static Room *enter(Rooms *rooms, long plane) {
    Room *room;
#pragma omp critical(kv_attention_rooms)
    {
        if (!rooms->of_plane[plane]) rooms->of_plane[plane] = rooms->free[--rooms->num_free];
        room = rooms->of_plane[plane];
    }
    return room;
}

/* Whether the part that ends was the last one of its plane: then it is the caller who finishes it. */
static int is_last(Rooms *rooms, long plane) {
    int num_left;
#pragma omp critical(kv_attention_rooms)
    num_left = --rooms->num_left[plane];
    return num_left == 0;
}

static void leave(Rooms *rooms, Room *room) {
#pragma omp critical(kv_attention_rooms)
    rooms->free[rooms->num_free++] = room;
}

static int num_in(const Call *call, long plane, int tile) {
    int rest = call->num_groups * tokens_of(call, plane) - tile * LANES;
    return rest < LANES ? rest : LANES;
}

static void start_part(const Call *call, const Room *room, long plane, int part) {
    for (int tile = 0; tile < tiles_of(call, plane); tile++) {
        Found *found = found_of(room, tile, part);
        memset(found, 0, room->found_bytes);
        for (int i = 0; i < LANES; i++) found->base[i] = -INFINITY;
    }
}

/* Puts the parts of one tile together in the first of them and writes its outputs, normalised. */
static void merge(const Call *call, const Room *room, int is_int8, long plane, int tile, int num_parts) {
    Found *all = found_of(room, tile, 0);
    for (int m = 0; m < num_in(call, plane, tile); m++) {
        uint16_t *out = (uint16_t *)call->out + query_at(call, plane, tile * LANES + m);
        float base = -INFINITY, sum = 0;
        for (int part = 0; part < num_parts; part++) base = fmaxf(base, found_of(room, tile, part)->base[m]);
        for (int part = 0; part < num_parts; part++) {
            const Found *found = found_of(room, tile, part);
            float factor = exp2f(found->base[m] - base);
            sum += factor * found->sum[m];
            for (int v = 0; v < room->num_vectors; v++) {
                float *own = all->out + (v * LANES + m) * 16;
                vec added = _mm512_mul_ps(_mm512_loadu_ps(found->out + (v * LANES + m) * 16), _mm512_set1_ps(factor));
                _mm512_storeu_ps(own, part ? _mm512_add_ps(_mm512_loadu_ps(own), added) : added);
            }
        }
        for (int v = 0; v < room->num_vectors; v += 4) {
            vec four[4];
            for (int i = 0; i < 4; i++)
                four[i] = _mm512_div_ps(_mm512_loadu_ps(all->out + ((v + i) * LANES + m) * 16), _mm512_set1_ps(sum));
            if (is_int8) swap_quarters(four);
            else in_order(four);
            for (int i = 0; i < 4 && 16 * (v + i) < call->dim; i++)
                _mm256_storeu_si256((__m256i *)(out + 16 * (v + i)), (__m256i)_mm512_cvtneps_pbh(four[i]));
        }
        all->base[m] = base, all->sum[m] = sum;
    }
}

/* Weights of the rows of a plane, mean of each token's queries: its columns, or added to the scores of its rows. */
static void add_columns(const Call *call, const Room *room, long plane, float *scores) {
    int seen = call->past[plane] + call->num_tokens, num_rows = call->num_rows;
    float *columns = scores ? scores : call->columns + plane * call->num_tokens * num_rows;
    for (int first = 0; first < seen; first += CHUNK)
        for (int token = 0; token < call->num_tokens; token++) {
            vec sums[CHUNK / 16] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int tile = 0; tile < tiles_of(call, plane); tile++) {
                const Found *all = found_of(room, tile, 0);
                long chunk = (long)tile * room->num_chunks + first / CHUNK;
                __m256 base = _mm256_loadu_ps(room->chunk_base + chunk * LANES), part = _mm256_set1_ps(1.0f / call->num_groups);
                __m256 factor = lower(exp2_of(twice(_mm256_sub_ps(base, _mm256_loadu_ps(all->base)))));
                __m256 share = _mm256_div_ps(_mm256_mul_ps(factor, part), _mm256_loadu_ps(all->sum));
                __mmask8 own = 0;
                for (int i = 0; i < num_in(call, plane, tile); i++)
                    own |= ((tile * LANES + i) % call->num_tokens == token) << i;
                share = _mm256_maskz_mov_ps(own, share);
                for (int i = 0; i < CHUNK / 16; i++) {
                    const uint16_t *kept = room->kept + (chunk * CHUNK + i * 16) * LANES;
                    vec added = own > 0xF ? shared_out(kept, share) : shared_out_of_four(kept, share);
                    sums[i] = _mm512_add_ps(sums[i], added);
                }
            }
            for (int i = 0, r = first; i < CHUNK / 16 && r < seen; i++, r += 16) {
                float *to = columns + (long)token * num_rows + r;
                __mmask16 is_seen = seen - r < 16 ? (1 << (seen - r)) - 1 : 0xFFFF;
                if (scores) sums[i] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(is_seen, to), _mm512_set1_ps(call->decay), sums[i]);
                _mm512_mask_storeu_ps(to, is_seen, sums[i]);
            }
        }
    for (int token = 0; token < call->num_tokens && !scores; token++)
        memset(columns + (long)token * num_rows + seen, 0, sizeof(float) * (num_rows - seen));
}
