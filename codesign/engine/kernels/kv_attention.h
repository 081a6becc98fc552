/* What the attention kernels beside this file are called with. */
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 32 /* rows of a block of paged storage */

enum { FP32 = 0, BF16 = 1, FP16 = 2 }; /* of native rows; the numbers are those of kv_attention.py */

/* The queries of a call and where its results go.
 *
 *     query, out [B, H_kv, M, dim]; query m is token m % num_tokens
 *     past [B, H_kv]: a query sees that many rows and then one more for its token and each before it
 *     columns [B, H_kv, num_tokens, num_rows] or NULL: weight that each row received, mean of a token's queries
 */
typedef struct {
    const float *query;
    const int32_t *past;
    float *out, *columns;
    int32_t num_slots, num_heads, num_queries, num_tokens, dim, num_rows, num_threads;
    float scale;
} Call;

/* Block tables of a call: those of (b, h) begin at b strides[0] + h strides[1]. */
typedef struct {
    const int32_t *ids;
    int64_t strides[2];
} Table;

/* Where the rows of a plane lie in a storage [.., dim]: one after the other, or in blocks of all KV heads. */
typedef struct {
    long first;           /* of rows one after the other */
    const int32_t *table; /* or block ids: storage [num_blocks, num_heads, BLOCK, dim]; NULL without blocks */
    long head, num_heads;
} Place;

INLINE long stored_at(const Place *place, int row) {
    if (!place->table) return place->first + row;
    return (place->table[row / BLOCK] * place->num_heads + place->head) * BLOCK + row % BLOCK;
}

INLINE Place in_blocks(const Call *call, const Table *table, long index) {
    long slot = index / call->num_heads, head = index % call->num_heads;
    return (Place){.table = table->ids + slot * table->strides[0] + head * table->strides[1],
                   .head = head,
                   .num_heads = call->num_heads};
}
