/* Parts of kv_attention_bf16.c: what each finds, and how they are put together, after kv_attention_digits.h. */
#include <stdlib.h>

#define PART 1024 /* rows of one piece of work */

/* What one part found for one tile; out is [num_vectors][LANES][16]. */
typedef struct {
    float base[LANES], sum[LANES];
    float out[];
} Found;

/* Memory of one call. Weights are kept only where columns are asked for: those of a chunk are 2^(base_of_chunk - base)
 * times what is kept. */
typedef struct {
    int num_parts, num_chunks; /* of the longest plane */
    int num_vectors;
    int *first_tile;    /* [B + 1]: tiles of all planes of the sequences before */
    size_t found_bytes; /* of one Found */
    char *found;                          /* [tiles of all planes, parts] */
    uint16_t *kept;                       /* [tiles of all planes, chunks CHUNK, LANES] */
    float *chunk_base;                    /* [tiles of all planes, chunks, LANES] */
} Room;

/* Tiles of the queries of a plane. */
static int tiles_of(const Call *call, long plane) {
    return (call->num_groups * tokens_of(call, plane) + LANES - 1) / LANES;
}

/* A tile among those of all planes. */
static long number_of(const Call *call, const Room *room, long plane, int tile) {
    return room->first_tile[plane / call->num_heads] + plane % call->num_heads * tiles_of(call, plane) + tile;
}

static Found *found_of(const Call *call, const Room *room, long plane, int tile, int part) {
    long number = number_of(call, room, plane, tile);
    return (Found *)(room->found + (number * room->num_parts + part) * room->found_bytes);
}

static int make_room(const Call *call, Room *room) {
    long num_tiles = 0;
    room->found = NULL, room->kept = NULL, room->chunk_base = NULL;
    room->first_tile = malloc(sizeof(int) * (call->num_slots + 1));
    if (!room->first_tile) return 0;
    for (int slot = 0; slot < call->num_slots; slot++) {
        room->first_tile[slot] = num_tiles;
        num_tiles += (long)call->num_heads * tiles_of(call, (long)slot * call->num_heads);
    }
    room->num_parts = (call->num_rows + PART - 1) / PART;
    room->num_chunks = (call->num_rows + CHUNK - 1) / CHUNK;
    room->num_vectors = (call->dim + 63) / 64 * 4;
    room->found_bytes = sizeof(Found) + sizeof(float) * LANES * 16 * room->num_vectors;
    room->found = aligned_alloc(64, num_tiles * room->num_parts * room->found_bytes);
    if (!room->found) return 0;
    if (!call->columns) return 1;
    long num_kept = num_tiles * room->num_chunks * LANES;
    room->chunk_base = malloc(num_kept * sizeof(float));
    room->kept = malloc(num_kept * CHUNK * sizeof(uint16_t));
    return room->chunk_base && room->kept;
}

static void give_back(Room *room) {
    free(room->first_tile), free(room->found), free(room->kept), free(room->chunk_base);
}

static int num_in(const Call *call, long plane, int tile) {
    int rest = call->num_groups * tokens_of(call, plane) - tile * LANES;
    return rest < LANES ? rest : LANES;
}

static void start_part(const Call *call, const Room *room, long plane, int part) {
    for (int tile = 0; tile < tiles_of(call, plane); tile++) {
        Found *found = found_of(call, room, plane, tile, part);
        memset(found, 0, room->found_bytes);
        for (int i = 0; i < LANES; i++) found->base[i] = -INFINITY;
    }
}

/* Puts the parts of one tile together in the first of them and writes its outputs, normalised. */
static void merge(const Call *call, const Room *room, int is_int8, long plane, int tile, int num_parts) {
    Found *all = found_of(call, room, plane, tile, 0);
    for (int m = 0; m < num_in(call, plane, tile); m++) {
        uint16_t *out = (uint16_t *)call->out + query_at(call, plane, tile * LANES + m);
        float base = -INFINITY, sum = 0;
        for (int part = 0; part < num_parts; part++) base = fmaxf(base, found_of(call, room, plane, tile, part)->base[m]);
        for (int part = 0; part < num_parts; part++) {
            const Found *found = found_of(call, room, plane, tile, part);
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

/* Columns of rows row .. last - 1 of a plane. */
static void add_columns(const Call *call, const Room *room, long plane, int row, int last) {
    float *column = call->columns + plane * call->num_tokens * call->num_rows;
    int seen = call->past[plane] + call->num_tokens, num_rows = call->num_rows;
    for (int token = 0; token < call->num_tokens; token++)
        memset(column + (long)token * num_rows + row, 0, sizeof(float) * (last - row));
    for (int tile = 0; tile < tiles_of(call, plane); tile++) {
        const Found *all = found_of(call, room, plane, tile, 0);
        int num = num_in(call, plane, tile);
        for (int first = row; first < last && first < seen; first += CHUNK) {
            long chunk = number_of(call, room, plane, tile) * room->num_chunks + first / CHUNK;
            __m256 below = _mm256_sub_ps(_mm256_loadu_ps(room->chunk_base + chunk * LANES), _mm256_loadu_ps(all->base));
            __m256 part = _mm256_set1_ps(1.0f / call->num_groups);
            __m256 share = _mm256_div_ps(_mm256_mul_ps(lower(exp2_of(twice(below))), part), _mm256_loadu_ps(all->sum));
            for (int token = 0; token < call->num_tokens; token++) {
                __mmask8 own = 0;
                for (int i = 0; i < num; i++) own |= ((tile * LANES + i) % call->num_tokens == token) << i;
                __m256 shares = _mm256_maskz_mov_ps(own, share);
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
