/* y = x Wt + bias in bf16 with fp32 sums, on AVX-512 with BF16 dot products; y may be fp32 too.
 *
 * Weights lie in blocks of 32 outputs, two inputs after two: a vector of 16 outputs takes in a pair of inputs with one
 * instruction, and rows of x, whose pairs are broadcast, share it. Up to ROWS rows at once are what the registers hold.
 * A block stays in the L2 cache for all rows of x of one pass, and the block after it is fetched meanwhile, so that few
 * rows are bound by memory and many by arithmetic, and what lies between by the slower of the two and not by their sum.
 *
 * An output is one sum over the inputs in their order, whatever the number of rows and threads: neighbours in a batch
 * change no bit.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define OUTPUTS 32       /* of a block */
#define ROWS 12          /* of x at once, at most */
#define STEP 8           /* pairs of inputs between fetches; what the inputs are filled up to */
#define PASS_BYTES (384 << 10) /* of x that should stay in the L2 cache beside a block */

typedef __m512 vec;

/* The first of part t, of `count` things in `num` parts as even as can be. */
INLINE int first_of(int count, int num, int t) { return (int)((long)count * t / num); }

/* Where a block's outputs go: row m to y or, if there is one, to wide, `stride` further on; those that `mask` has. */
typedef struct {
    const float *bias;
    uint16_t *y;
    float *wide;
    long stride;
    __mmask32 mask;
} Out;

/* One tile: outputs [rows, 32] of x [pairs][rows] and a block [pairs][32], each of pairs. `rows` constant where inlined.
 * From `later`, `lines` lines of 64 bytes every STEP pairs are fetched. */
INLINE void tile(int rows, int pairs, const uint32_t *x, const uint32_t *block, const char *later, int lines, Out out) {
    vec sum[ROWS][2];
    for (int m = 0; m < rows; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int k = 0; k < pairs; k += STEP) {
        for (int i = 0; i < lines; i++, later += 64) _mm_prefetch(later, _MM_HINT_T1);
        for (int i = 0; i < STEP; i++, x += rows, block += OUTPUTS) {
            __m512bh one = (__m512bh)_mm512_loadu_si512(block), two = (__m512bh)_mm512_loadu_si512(block + 16);
            for (int m = 0; m < rows; m++) {
                __m512bh own = (__m512bh)_mm512_set1_epi32((int)x[m]);
                sum[m][0] = _mm512_dpbf16_ps(sum[m][0], own, one);
                sum[m][1] = _mm512_dpbf16_ps(sum[m][1], own, two);
            }
        }
    }
    vec low = out.bias ? _mm512_loadu_ps(out.bias) : _mm512_setzero_ps();
    vec high = out.bias ? _mm512_loadu_ps(out.bias + 16) : _mm512_setzero_ps();
    for (int m = 0; m < rows; m++) {
        vec one = _mm512_add_ps(sum[m][0], low), two = _mm512_add_ps(sum[m][1], high);
        if (out.wide) {
            _mm512_mask_storeu_ps(out.wide + m * out.stride, (__mmask16)out.mask, one);
            _mm512_mask_storeu_ps(out.wide + m * out.stride + 16, (__mmask16)(out.mask >> 16), two);
        } else {
            _mm512_mask_storeu_epi16(out.y + m * out.stride, out.mask, (__m512i)_mm512_cvtne2ps_pbh(two, one));
        }
    }
}

#define TILE(R) \
    case R: tile(R, pairs, x, block, later, lines, out); break;

static void tile_of(int rows, int pairs, const uint32_t *x, const uint32_t *block, const char *later, int lines, Out out) {
    switch (rows) {
        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
    }
}

/* Rows [first, last) of x [.., num_in] as pairs, [pairs][last - first]; zeros after the last input. */
static void lay_out(const uint16_t *x, int first, int last, int num_in, int pairs, uint32_t *out) {
    int rows = last - first;
    for (int m = 0; m < rows; m++) {
        const uint16_t *row = x + (long)(first + m) * num_in;
        for (int k = 0; k < num_in / 2; k++) memcpy(out + (long)k * rows + m, row + 2 * k, 4);
        for (int k = num_in / 2; k < pairs; k++) out[(long)k * rows + m] = 2 * k < num_in ? row[2 * k] : 0;
    }
}

/* Inputs as the blocks have them: pairs, filled up. */
int dense_pairs(int num_in) { return (num_in + 2 * STEP - 1) / (2 * STEP) * STEP; }

/* w [num_out, num_in] -> blocks [num_out / 32, rounded up][pairs][32] of pairs, zeros where there is nothing. */
void dense_pack(const uint16_t *w, uint32_t *blocks, int num_in, int num_out) {
    int pairs = dense_pairs(num_in), num_blocks = (num_out + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(static)
    for (int b = 0; b < num_blocks; b++) {
        uint32_t *block = blocks + (long)b * pairs * OUTPUTS;
        int last = (b + 1) * OUTPUTS < num_out ? (b + 1) * OUTPUTS : num_out;
        memset(block, 0, (size_t)pairs * OUTPUTS * 4);
        for (int n = b * OUTPUTS; n < last; n++)
            for (int k = 0; k < num_in; k++)
                memcpy((uint16_t *)(block + (long)(k / 2) * OUTPUTS + n % OUTPUTS) + k % 2, w + (long)n * num_in + k, 2);
    }
}

/* The inverse. */
void dense_unpack(const uint32_t *blocks, uint16_t *w, int num_in, int num_out) {
    int pairs = dense_pairs(num_in);
#pragma omp parallel for schedule(static)
    for (int n = 0; n < num_out; n++)
        for (int k = 0; k < num_in; k++)
            memcpy(w + (long)n * num_in + k,
                   (const uint16_t *)(blocks + ((long)(n / OUTPUTS) * pairs + k / 2) * OUTPUTS + n % OUTPUTS) + k % 2, 2);
}

/* x [num_rows, num_in], blocks as above, bias [blocks * 32] fp32 or NULL, y [num_rows, num_out] or, if not NULL, wide
 * instead; scratch [num_rows][pairs] of pairs. */
void dense_matmul(const uint16_t *x, const uint32_t *blocks, const float *bias, uint16_t *y, float *wide,
                  uint32_t *scratch, int num_rows, int num_in, int num_out) {
    int pairs = dense_pairs(num_in), num_blocks = (num_out + OUTPUTS - 1) / OUTPUTS;
    int num_tiles = (num_rows + ROWS - 1) / ROWS;
    int tiles_of_pass = PASS_BYTES / (pairs * 4 * ROWS);
    if (tiles_of_pass < 2) tiles_of_pass = 2;
    int num_passes = (num_tiles + tiles_of_pass - 1) / tiles_of_pass;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int t = 0; t < num_tiles; t++) {
            int first = first_of(num_rows, num_tiles, t), last = first_of(num_rows, num_tiles, t + 1);
            lay_out(x, first, last, num_in, pairs, scratch + (long)first * pairs);
        }
        for (int pass = 0; pass < num_passes; pass++) {
            int from = first_of(num_tiles, num_passes, pass), to = first_of(num_tiles, num_passes, pass + 1);
            int lines = (2 * STEP + to - from - 1) / (to - from);
#pragma omp for schedule(static) nowait
            for (int b = 0; b < num_blocks; b++) {
                const uint32_t *block = blocks + (long)b * pairs * OUTPUTS;
                const char *later = (const char *)(block + (long)(b + 1 < num_blocks ? pairs : 0) * OUTPUTS);
                int rest = num_out - b * OUTPUTS;
                for (int t = from; t < to; t++, later += (long)lines * 64 * (pairs / STEP)) {
                    int first = first_of(num_rows, num_tiles, t), last = first_of(num_rows, num_tiles, t + 1);
                    long place = (long)first * num_out + b * OUTPUTS;
                    Out out = {bias ? bias + b * OUTPUTS : 0, y + place, wide ? wide + place : 0, num_out,
                               rest < OUTPUTS ? (1u << rest) - 1 : 0xFFFFFFFF};
                    tile_of(last - first, pairs, scratch + (long)first * pairs, block, later, lines, out);
                }
            }
        }
    }
}
