/* The small operations between a layer's products, each in one pass: residual + RMSNorm, RMSNorm of heads, SiLU * up,
 * rotary positions of q and k.
 *
 * Bit for bit what the operations of torch in plain.py give, because a configuration should mean one result: fp32 inside,
 * rounded to the dtype where they round, sums in the order of ATen's kernels, products contracted with sums where they
 * contract them. What differs: fp32 rows that are no whole number of vectors (8 values for RMSNorm, 32 for SiLU), whose
 * rest ATen's compiler treats in its own way (at most 8 last places), and the bits of a NaN.
 */
#pragma GCC optimize("fp-contract=off")
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define LANES 16
#define MULTIPLY_ADD(a, b, c) (vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define LEAST(a, b) (vec)_mm512_min_ps((__m512)(a), (__m512)(b))
#define GREATEST(a, b) (vec)_mm512_max_ps((__m512)(a), (__m512)(b))
#else
#define LANES 8
#define MULTIPLY_ADD(a, b, c) (vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#define LEAST(a, b) (vec)_mm256_min_ps((__m256)(a), (__m256)(b))
#define GREATEST(a, b) (vec)_mm256_max_ps((__m256)(a), (__m256)(b))
#endif
#define GRAIN 8192 /* values from which two threads, which wait for work awake, beat one */

enum { FP32, BF16 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float eight __attribute__((vector_size(32)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE vec load(const void *x, long i, int dtype) {
    vec value;
    if (dtype == FP32) {
        memcpy(&value, (const float *)x + i, sizeof value);
        return value;
    }
    halves half;
    memcpy(&half, (const uint16_t *)x + i, sizeof half);
    return (vec)(__builtin_convertvector(half, bits) << 16);
}

/* To nearest, ties to even. A NaN here comes from bf16 values or an operation, so its low half is 0 and it stays one. */
INLINE bits to_bf16(vec value) { return ((bits)value + 0x7FFF + ((bits)value >> 16 & 1)) >> 16; }

INLINE vec rounded(vec value, int dtype) { return dtype == FP32 ? value : (vec)(to_bf16(value) << 16); }

INLINE void store(void *y, long i, vec value, int dtype) {
    if (dtype == FP32) {
        memcpy((float *)y + i, &value, sizeof value);
        return;
    }
    halves half = __builtin_convertvector(to_bf16(value), halves);
    memcpy((uint16_t *)y + i, &half, sizeof half);
}

INLINE vec splat(float value) { return (vec){0} + value; }

INLINE long size_of(int dtype) { return dtype == FP32 ? 4 : 2; }

/* The last values of a row, fewer than LANES, with zeros behind them. */
INLINE vec load_part(const void *x, long i, long count, int dtype) {
    float part[LANES] = {0};
    memcpy(part, (const char *)x + i * size_of(dtype), count * size_of(dtype));
    return load(part, 0, dtype);
}

INLINE void store_part(void *y, long i, vec value, long count, int dtype) {
    float part[LANES];
    store(part, 0, value, dtype);
    memcpy((char *)y + i * size_of(dtype), part, count * size_of(dtype));
}

/* Partial sums of squares in eight lanes, whatever the vectors: ATen has this kernel for AVX2 only. */
INLINE eight add_squares(eight sums, vec value) {
    for (int part = 0; part < LANES / 8; part++) {
        eight own;
        memcpy(&own, (const float *)&value + 8 * part, sizeof own);
        sums += own * own;
    }
    return sums;
}

/* y = round(x scale) weight over one row; with a change, sum = x + change takes the place of x. */
INLINE void norm_row(const void *x, const void *change, const void *weight, void *sum, void *y, int dtype, long size,
                     float per_value, float eps) {
    eight squares = {0};
    long whole = size - size % LANES, rest = size % LANES, k = 0;
    for (; k < whole; k += LANES) {
        vec value = load(x, k, dtype);
        if (change) {
            value = rounded(value + load(change, k, dtype), dtype);
            store(sum, k, value, dtype);
        }
        squares = add_squares(squares, value);
    }
    vec last = {0};
    if (rest) {
        last = load_part(x, k, rest, dtype);
        if (change) {
            last = rounded(last + load_part(change, k, rest, dtype), dtype);
            store_part(sum, k, last, rest, dtype);
        }
        if (rest >= 8) {
            eight own;
            memcpy(&own, &last, sizeof own);
            squares += own * own;
        }
    }
    float total = squares[0];
    for (int lane = 1; lane < 8; lane++) total += squares[lane];
    for (int lane = rest & 8; lane < rest; lane++) total += last[lane] * last[lane];
    float norm = sqrtf(total), scale = 1 / sqrtf(norm * norm * per_value + eps);
    const void *from = change ? sum : x;
    for (k = 0; k < whole; k += LANES)
        store(y, k, rounded(load(from, k, dtype) * scale, dtype) * load(weight, k, dtype), dtype);
    if (rest) store_part(y, k, rounded(last * scale, dtype) * load_part(weight, k, rest, dtype), rest, dtype);
}

#define AT(p, i) ((char *)(p) + (i) * size_of(dtype))

INLINE void norm_rows(const void *x, const void *change, const void *weight, void *sum, void *y, int dtype, long rows,
                      long size, float per_value, float eps) {
#pragma omp parallel for schedule(static) if (rows * size > GRAIN)
    for (long row = 0; row < rows; row++) {
        long at = row * size;
        norm_row(AT(x, at), change ? AT(change, at) : 0, weight, change ? AT(sum, at) : 0, AT(y, at), dtype, size,
                 per_value, eps);
    }
}

/* x and change [rows, size] -> sum = x + change, y = norm(sum); without a change only y = norm(x). */
void norm(const void *x, const void *change, const void *weight, void *sum, void *y, int dtype, long rows, long size,
          float per_value, float eps) {
    if (dtype == FP32)
        norm_rows(x, change, weight, sum, y, FP32, rows, size, per_value, eps);
    else
        norm_rows(x, change, weight, sum, y, BF16, rows, size, per_value, eps);
}

/* Head `head` of a token, of q or of k. */
#define HEAD(q, q_stride, k, k_stride) \
    (head < num_q ? AT(q, token * (q_stride) + head * size) : AT(k, token * (k_stride) + (head - num_q) * size))

INLINE void norm_heads_of(const void *q, long q_stride, const void *k, long k_stride, const void *q_weight,
                          const void *k_weight, void *y, int dtype, long tokens, long num_q, long num_k, long size,
                          float per_value, float eps) {
    long num = num_q + num_k;
#pragma omp parallel for schedule(static) if (tokens * num * size > GRAIN)
    for (long token = 0; token < tokens; token++)
        for (long head = 0; head < num; head++)
            norm_row(HEAD(q, q_stride, k, k_stride), 0, head < num_q ? q_weight : k_weight, 0,
                     AT(y, (token * num + head) * size), dtype, size, per_value, eps);
}

/* q [tokens, num_q, size] and k [tokens, num_k, size], tokens `stride` values apart -> y [tokens, num_q + num_k, size],
 * each head normalised by itself. */
void norm_heads(const void *q, long q_stride, const void *k, long k_stride, const void *q_weight, const void *k_weight,
                void *y, int dtype, long tokens, long num_q, long num_k, long size, float per_value, float eps) {
    if (dtype == FP32)
        norm_heads_of(q, q_stride, k, k_stride, q_weight, k_weight, y, FP32, tokens, num_q, num_k, size, per_value, eps);
    else
        norm_heads_of(q, q_stride, k, k_stride, q_weight, k_weight, y, BF16, tokens, num_q, num_k, size, per_value, eps);
}

INLINE void rotate_head(const void *x, const float *cos, const float *sin, void *y, int dtype, long half) {
    long whole = half - half % LANES, rest = half % LANES;
    for (int side = 0; side < 2; side++) {
        long own = side * half, other = half - own;
        for (long i = 0; i < whole; i += LANES)
            store(y, own + i,
                  MULTIPLY_ADD(load(x, other + i, dtype), load(sin, own + i, FP32), load(x, own + i, dtype) * load(cos, own + i, FP32)),
                  dtype);
        if (rest) {
            vec value = load_part(x, own + whole, rest, dtype) * load_part(cos, own + whole, rest, FP32);
            value = MULTIPLY_ADD(load_part(x, other + whole, rest, dtype), load_part(sin, own + whole, rest, FP32), value);
            store_part(y, own + whole, value, rest, dtype);
        }
    }
}

INLINE void rotate_heads(const void *q, long q_stride, const void *k, long k_stride, const float *cos, const float *sin,
                         void *y, int dtype, long tokens, long num_q, long num_k, long size) {
    long num = num_q + num_k;
#pragma omp parallel for schedule(static) if (tokens * num * size > GRAIN)
    for (long token = 0; token < tokens; token++)
        for (long head = 0; head < num; head++)
            rotate_head(HEAD(q, q_stride, k, k_stride), cos + token * size, sin + token * size,
                        AT(y, (token * num + head) * size), dtype, size / 2);
}

INLINE void rotate_heads_into(const void *q, long q_stride, const void *k, long k_stride, const void *v, long v_stride,
                              const float *cos, const float *sin, void *y, void *key, void *value, const int64_t *rows,
                              int dtype, long tokens, long num_q, long num_k, long size) {
    long num = num_q + num_k, width = size_of(dtype);
#pragma omp parallel for schedule(static) if (tokens * num * size > GRAIN)
    for (long token = 0; token < tokens; token++) {
        const int64_t *own_rows = rows + token * num_k;
        /* Rows of a cache are seldom near: they are fetched while the queries are turned. */
        for (long own = 0; own < num_k; own++)
            for (long i = 0; i < size; i += 64 / width) {
                __builtin_prefetch(AT(key, own_rows[own] * size + i), 1);
                if (v) __builtin_prefetch(AT(value, own_rows[own] * size + i), 1);
            }
        for (long head = 0; head < num; head++) {
            long own = head - num_q; /* KV head */
            void *to = own < 0 ? AT(y, (token * num_q + head) * size) : AT(key, own_rows[own] * size);
            rotate_head(HEAD(q, q_stride, k, k_stride), cos + token * size, sin + token * size, to, dtype, size / 2);
            if (own >= 0 && v)
                memcpy(AT(value, own_rows[own] * size), AT(v, token * v_stride + own * size), size * width);
        }
    }
}

/* The same, but turned keys and v [tokens, num_k, size] go into rows [tokens, num_k] of key and value [.., size], and y
 * [tokens, num_q, size] holds the queries alone. Without v keys alone are written. */
void rotate_into(const void *q, long q_stride, const void *k, long k_stride, const void *v, long v_stride,
                 const float *cos, const float *sin, void *y, void *key, void *value, const int64_t *rows, int dtype,
                 long tokens, long num_q, long num_k, long size) {
    if (dtype == FP32)
        rotate_heads_into(q, q_stride, k, k_stride, v, v_stride, cos, sin, y, key, value, rows, FP32, tokens, num_q,
                          num_k, size);
    else
        rotate_heads_into(q, q_stride, k, k_stride, v, v_stride, cos, sin, y, key, value, rows, BF16, tokens, num_q,
                          num_k, size);
}

/* q [tokens, num_q, size] and k [tokens, num_k, size], tokens `stride` values apart; cos and sin [tokens, size], sin with
 * the sign of its half -> y [tokens, num_q + num_k, size]. */
void rotate(const void *q, long q_stride, const void *k, long k_stride, const float *cos, const float *sin, void *y,
            int dtype, long tokens, long num_q, long num_k, long size) {
    if (dtype == FP32)
        rotate_heads(q, q_stride, k, k_stride, cos, sin, y, FP32, tokens, num_q, num_k, size);
    else
        rotate_heads(q, q_stride, k, k_stride, cos, sin, y, BF16, tokens, num_q, num_k, size);
}


/* e^x to one ulp, as SLEEF computes it (Shibata & Petrogalli, 2020; https://sleef.org), which ATen calls. */
INLINE vec exponential(vec x) {
    const float magic = 12582912; /* 1.5 2^23: adding it rounds to a whole number, ties to even */
    x = LEAST(splat(100), GREATEST(splat(-104), x)); /* beyond, e^x is 0 or infinity; NaN stays */
    vec power = x * 1.44269504f + magic - magic;
    vec s = MULTIPLY_ADD(power, splat(-1.428606765e-06f), MULTIPLY_ADD(power, splat(-0.693145751953125f), x));
    vec u = splat(0.000198527617612853646f);
    u = MULTIPLY_ADD(u, s, splat(0.00139304355252534151f));
    u = MULTIPLY_ADD(u, s, splat(0.00833336077630519867f));
    u = MULTIPLY_ADD(u, s, splat(0.0416664853692054749f));
    u = MULTIPLY_ADD(u, s, splat(0.166666671633720398f));
    u = MULTIPLY_ADD(u, s, splat(0.5f));
    u = MULTIPLY_ADD(s * s, u, s) + 1.0f;
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)u, (__m512)power);
#else
    ints whole = __builtin_convertvector(power, ints), half = whole >> 1; /* 2^whole may be no float where e^x is one */
    return u * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23);
#endif
}

INLINE vec gated(vec gate, vec up, int dtype) {
    return rounded(gate / (exponential(-gate) + 1.0f), dtype) * up;
}

INLINE void silu_rows(const void *gate_up, void *y, int dtype, long rows, long size) {
    long whole = size - size % LANES, rest = size % LANES;
#pragma omp parallel for schedule(static) if (rows * size > GRAIN)
    for (long row = 0; row < rows; row++) {
        const void *gate = AT(gate_up, 2 * row * size), *up = AT(gate, size);
        void *own = AT(y, row * size);
        for (long i = 0; i < whole; i += LANES)
            store(own, i, gated(load(gate, i, dtype), load(up, i, dtype), dtype), dtype);
        if (rest)
            store_part(own, whole, gated(load_part(gate, whole, rest, dtype), load_part(up, whole, rest, dtype), dtype),
                       rest, dtype);
    }
}

/* gate_up [rows, 2 size] -> y [rows, size] = silu(gate) up. */
void silu_mul(const void *gate_up, void *y, int dtype, long rows, long size) {
    if (dtype == FP32)
        silu_rows(gate_up, y, FP32, rows, size);
    else
        silu_rows(gate_up, y, BF16, rows, size);
}
