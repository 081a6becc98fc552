/* y = x Wt + bias in bf16 with fp32 sums, on AVX-512 with BF16 dot products; y may be fp32 too. W is bf16 in blocks, or
 * int8 codes, of which a block at a time is widened (exactly) for all rows of x.
 *
 * Weights lie in blocks of 32 outputs, two inputs after two: a vector of 16 outputs takes in a pair of inputs with one
 * instruction, and rows of x, whose pairs are broadcast, share it. Up to ROWS rows at once are what the registers hold.
 * A block stays in the L2 cache for all rows of x of one pass, and the block after it is fetched meanwhile, so that few
 * rows are bound by memory and many by arithmetic, and what lies between by the slower of the two and not by their sum.
 *
 * An output is the sum over one half of the inputs, in their order, plus that over the other, whatever the number of
 * rows and threads: neighbours in a batch change no bit. Where y is fp32 it is one sum: two ranks with a half of the
 * inputs each, a multiple of 16, add up to the very output of one rank.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define OUTPUTS 32           /* of a block */
#define ROWS 12              /* of x at once, at most */
#define STEP 8               /* pairs of inputs between fetches; what the inputs are filled up to */
#define PASS_BYTES (2 << 20) /* of x for which a block is held, or widened, once */

typedef __m512 vec;

/* The first of part t, of `count` things in `num` parts as even as can be. */
INLINE int first_of(int count, int num, int t) { return (int)((long)count * t / num); }

/* Where a block's outputs go: row m to y or, if there is one, to wide, `stride` further on; those that `mask` has. */
typedef struct {
    const float *scale, *bias; /* of its outputs, or NULL */
    uint16_t *y;
    float *wide;
    long stride;
    __mmask32 mask;
} Out;

/* Adds `pairs` pairs of inputs: x [pairs][rows] and a block [pairs][32]; from `later` on, `lines` lines of 64 bytes are
 * fetched every STEP pairs. */
INLINE void add_up(int rows, int pairs, const uint32_t *x, const uint32_t *block, const char *later, int lines,
                   vec sum[ROWS][2]) {
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
}

/* One tile: outputs [rows, 32] of x [pairs][rows] and a block [pairs][32], each of pairs. `rows` constant where inlined. */
INLINE void tile(int rows, int pairs, const uint32_t *x, const uint32_t *block, const char *later, int lines, Out out) {
    vec sum[ROWS][2], before[ROWS][2];
    int half = out.wide ? 0 : pairs / (2 * STEP) * STEP;
    add_up(rows, half, x, block, later, lines, before);
    add_up(rows, pairs - half, x + (long)half * rows, block + (long)half * OUTPUTS, later + (long)half / STEP * lines * 64,
           lines, sum);
    vec low = _mm512_setzero_ps(), high = _mm512_setzero_ps(), by_low = _mm512_set1_ps(1), by_high = _mm512_set1_ps(1);
    if (out.bias) {
        low = _mm512_maskz_loadu_ps((__mmask16)out.mask, out.bias);
        high = _mm512_maskz_loadu_ps((__mmask16)(out.mask >> 16), out.bias + 16);
    }
    if (out.scale) {
        by_low = _mm512_maskz_loadu_ps((__mmask16)out.mask, out.scale);
        by_high = _mm512_maskz_loadu_ps((__mmask16)(out.mask >> 16), out.scale + 16);
    }
    for (int m = 0; m < rows; m++) {
        vec one = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(before[m][0], by_low), _mm512_mul_ps(sum[m][0], by_low)), low);
        vec two = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(before[m][1], by_high), _mm512_mul_ps(sum[m][1], by_high)), high);
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

/* 32 codes as bf16. */
INLINE __m512i widened(const int8_t *codes) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes + 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* Turns a 16 x 16 matrix. */
INLINE void turn(__m512i *row) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) { /* pairs of rows, lanes of 32 bits */
        t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* fours of rows, of 64 bits */
        row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* row[4 r + i] has columns i, 4 + i, 8 + i, 12 + i of rows 4 r .. 4 r + 3 */
        __m512i a = _mm512_shuffle_i32x4(row[i], row[4 + i], 0x88), b = _mm512_shuffle_i32x4(row[i], row[4 + i], 0xDD);
        __m512i c = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0x88), d = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0xDD);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88), t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xDD);
        t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88), t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
    for (int i = 0; i < 16; i++) row[i] = t[i];
}

/* codes [rows, num_in] of one block, rows <= 32, num_in a multiple of 16 -> [pairs][32] of pairs; what lacks is 0. */
static void widen_block(const int8_t *codes, int rows, int num_in, int pairs, uint32_t *block) {
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 2 * pairs; k += 32) {
            __m512i row[16];
            int8_t part[32] = {0};
            for (int n = 0; n < 16; n++) {
                const int8_t *from = codes + (long)(16 * half + n) * num_in + k;
                if (16 * half + n >= rows) row[n] = _mm512_setzero_si512();
                else if (k + 32 <= num_in) row[n] = widened(from);
                else memcpy(part, from, 16), row[n] = widened(part);
            }
            turn(row);
            for (int i = 0; i < 16 && k / 2 + i < pairs; i++)
                _mm512_storeu_si512(block + (long)(k / 2 + i) * OUTPUTS + 16 * half, row[i]);
        }
}

/* Weights are blocks, or codes [num_out, num_in] where there are some; else as the two functions below. 1: no memory. */
INLINE int multiply(const uint16_t *x, const uint32_t *blocks, const int8_t *codes, const float *scale, const float *bias,
                    uint16_t *y, float *wide, uint32_t *scratch, int num_rows, int num_in, int num_out) {
    int pairs = dense_pairs(num_in), num_blocks = (num_out + OUTPUTS - 1) / OUTPUTS, lacks_memory = 0;
    int num_tiles = (num_rows + ROWS - 1) / ROWS;
    int tiles_of_pass = PASS_BYTES / (pairs * 4 * ROWS);
    if (tiles_of_pass < 2) tiles_of_pass = 2;
    int num_passes = (num_tiles + tiles_of_pass - 1) / tiles_of_pass;
    long block_bytes = codes ? (long)OUTPUTS * num_in : (long)OUTPUTS * pairs * 4;
#pragma omp parallel reduction(| : lacks_memory)
    {
        uint32_t *own = codes ? aligned_alloc(64, (size_t)OUTPUTS * pairs * 4) : NULL;
        lacks_memory = codes && !own;
#pragma omp for schedule(static)
        for (int t = 0; t < num_tiles; t++) {
            int first = first_of(num_rows, num_tiles, t), last = first_of(num_rows, num_tiles, t + 1);
            lay_out(x, first, last, num_in, pairs, scratch + (long)first * pairs);
        }
        for (int pass = 0; pass < num_passes; pass++) {
            int from = first_of(num_tiles, num_passes, pass), to = first_of(num_tiles, num_passes, pass + 1);
            int lines = (int)((block_bytes / 64 * STEP / pairs + to - from) / (to - from));
#pragma omp for schedule(static) nowait
            for (int b = 0; b < num_blocks; b++) {
                if (lacks_memory) continue;
                int rest = num_out - b * OUTPUTS, next = b + 1 < num_blocks ? b + 1 : b;
                const uint32_t *block = own ? own : blocks + (long)b * pairs * OUTPUTS;
                const char *later = (codes ? (const char *)codes : (const char *)blocks) + next * block_bytes;
                if (own)
                    widen_block(codes + b * block_bytes, rest < OUTPUTS ? rest : OUTPUTS, num_in, pairs, own);
                for (int t = from; t < to; t++, later += (long)lines * 64 * (pairs / STEP)) {
                    int first = first_of(num_rows, num_tiles, t), last = first_of(num_rows, num_tiles, t + 1);
                    long place = (long)first * num_out + b * OUTPUTS;
                    Out out = {.scale = scale ? scale + b * OUTPUTS : 0,
                               .bias = bias ? bias + b * OUTPUTS : 0,
                               .y = y + place,
                               .wide = wide ? wide + place : 0,
                               .stride = num_out,
                               .mask = rest < OUTPUTS ? (1u << rest) - 1 : 0xFFFFFFFF};
                    tile_of(last - first, pairs, scratch + (long)first * pairs, block, later, lines, out);
                }
            }
        }
        free(own);
    }
    return lacks_memory;
}

/* x [num_rows, num_in], blocks as above, bias [num_out] fp32 or NULL, y [num_rows, num_out] or, if not NULL, wide
 * instead; scratch [num_rows][pairs] of pairs. */
void dense_matmul(const uint16_t *x, const uint32_t *blocks, const float *bias, uint16_t *y, float *wide,
                  uint32_t *scratch, int num_rows, int num_in, int num_out) {
    multiply(x, blocks, NULL, NULL, bias, y, wide, scratch, num_rows, num_in, num_out);
}

/* The same for codes [num_out, num_in] times scale [num_out], num_in a multiple of 16. 1: no memory. */
int dense_int8(const uint16_t *x, const int8_t *codes, const float *scale, uint16_t *y, float *wide, uint32_t *scratch,
               int num_rows, int num_in, int num_out) {
    return multiply(x, NULL, codes, scale, NULL, y, wide, scratch, num_rows, num_in, num_out);
}
