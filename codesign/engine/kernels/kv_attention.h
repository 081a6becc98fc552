/* What the attention kernels beside this file are called with. */
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 32 /* rows of a block of paged storage */

enum { FP32 = 0, BF16 = 1, FP16 = 2 }; /* of native rows; the numbers are those of kv_attention.py */

/* The queries of a call and where its results go.
 *
 *     query, out [N, H_kv num_groups, dim]: tokens packed one after the other, in fp32 for kv_attention.c and in bf16 for
 *         kv_attention_bf16.c
 *     starts [B + 1]: of the tokens of each sequence, T_b of them and num_tokens at most; its KV head h has num_groups T_b
 *         queries, of which query m is token m % T_b for head h num_groups + m / T_b
 *     past [B, H_kv]: a query sees that many rows and then one more for its token and each before it
 *     columns [B, H_kv, num_tokens, num_rows] or NULL: weight that each row received, mean of a token's queries; then
 *         every sequence has num_tokens
 *     scores or NULL: one of each native row, in its order and not in blocks; becomes decay times itself plus the weight
 *         that the row received, mean of the queries of the one token that every sequence then has
 */
typedef struct {
    const void *query;
    const int32_t *past, *starts;
    void *out;
    float *columns, *scores;
    int32_t num_slots, num_heads, num_groups, num_tokens, dim, num_rows, num_threads;
    float scale, decay;
} Call;

/* Tokens of the sequence that a plane is of. */
INLINE int tokens_of(const Call *call, long plane) {
    const int32_t *start = call->starts + plane / call->num_heads;
    return start[1] - start[0];
}

/* Where query m of a plane is in `query` and its result in `out`. */
INLINE long query_at(const Call *call, long plane, int m) {
    int num_tokens = tokens_of(call, plane), token = call->starts[plane / call->num_heads] + m % num_tokens;
    long head = plane % call->num_heads * call->num_groups + m / num_tokens;
    return ((long)token * call->num_heads * call->num_groups + head) * call->dim;
}

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
