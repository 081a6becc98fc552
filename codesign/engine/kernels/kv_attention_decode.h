/* Codes of fp8 and int4 as bf16, exact, for kv_attention_tile.h; scales and ranges are left to queries and weights. */

/* fp8 (e4m3) codes: their bits moved to where bf16 has them, exponent biased anew; subnormals, of 0 to 7, looked up. */
static void decode_fp8(const uint8_t *codes, const uint8_t *later, int count, uint16_t *out) {
    const __m512i subnormal = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60)); /* n / 512 */
    for (int i = 0; i < count; i += 32) {
        __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + i)));
        if (i % 64 == 0) _mm_prefetch(later + i, _MM_HINT_T1);
        __m512i bits = _mm512_and_si512(_mm512_slli_epi16(wide, 4), _mm512_set1_epi16(0x7F0));
        bits = _mm512_add_epi16(bits, _mm512_set1_epi16(120 << 7));
        __mmask32 is_subnormal = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x78));
        bits = _mm512_mask_permutexvar_epi16(bits, is_subnormal, wide, subnormal);
        __m512i sign = _mm512_and_si512(_mm512_slli_epi16(wide, 8), _mm512_set1_epi16((short)0x8000));
        _mm512_storeu_si512(out + i, _mm512_or_si512(bits, sign));
    }
}

/* The lower four bits of 16-bit numbers as code - 7.5, which rounding of what it meets harms less than code. */
INLINE __m512i from_nibbles(__m512i numbers) {
    const __m512i bf16_of = _mm512_broadcast_i64x4(_mm256_setr_epi16( /* twice: a permutation looks at five bits */
        (short)0xC0F0, (short)0xC0D0, (short)0xC0B0, (short)0xC090, (short)0xC060, (short)0xC020, (short)0xBFC0,
        (short)0xBF00, 0x3F00, 0x3FC0, 0x4020, 0x4060, 0x4090, 0x40B0, 0x40D0, 0x40F0));
    return _mm512_permutexvar_epi16(numbers, bf16_of);
}

/* int4 codes [rows, dim / 2] of keys. */
static void decode_int4(const uint8_t *codes, const uint8_t *later, int rows, int dim, uint16_t *out) {
    for (int r = 0; r < rows; r++)
        for (int d = 0; d < dim / 2; d += 32) {
            const uint8_t *from = codes + r * dim / 2 + d;
            __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
            if (r % 2 == 0) _mm_prefetch(later + (from - codes), _MM_HINT_T1);
            _mm512_storeu_si512(out + r * dim + d, from_nibbles(wide));
            _mm512_storeu_si512(out + r * dim + dim / 2 + d, from_nibbles(_mm512_srli_epi16(wide, 4)));
        }
}

/* add_values of int4 codes [rows, dim / 2], 32 channels of the low halves and 32 of the high ones, each with pairs and a
 * start of its own: outputs out and out_high, for in_order to put in order. */
INLINE void add_nibbles(int num, int dim, const uint8_t *codes, const char *const *later, int rows,
                        const uint32_t *const *pairs, const float *const *start, float *out, float *out_high) {
    for (int pass = 0; pass < 2; pass++) {
        float *own[2] = {out + pass * LANES * 16, out_high + pass * LANES * 16};
        vec sum[LANES][2];
        for (int m = 0; m < num; m++)
            for (int i = 0; i < 2; i++)
                sum[m][i] = _mm512_add_ps(_mm512_loadu_ps(own[i] + m * 16), _mm512_set1_ps(start[i][m]));
        for (int r = 0; r < rows; r += 2) {
            const uint8_t *row = codes + r * dim / 2;
            __m256i one = _mm256_shuffle_epi32(_mm256_loadu_si256((const __m256i *)row), 0xD8);
            __m256i two = _mm256_shuffle_epi32(_mm256_loadu_si256((const __m256i *)(row + dim / 2)), 0xD8);
            _mm_prefetch(later[r / GROUP] + (r % GROUP + pass) * dim / 2, _MM_HINT_T1);
            __m512i both = _mm512_cvtepu8_epi16(pass ? _mm256_unpackhi_epi8(one, two) : _mm256_unpacklo_epi8(one, two));
            __m512bh low = (__m512bh)from_nibbles(both), high = (__m512bh)from_nibbles(_mm512_srli_epi16(both, 4));
            for (int m = 0; m < num; m++) {
                const uint32_t *weight = pairs[0] + r / 2 * LANES + m, *weight_high = pairs[1] + r / 2 * LANES + m;
                sum[m][0] = _mm512_dpbf16_ps(sum[m][0], (__m512bh)_mm512_set1_epi32((int)*weight), low);
                sum[m][1] = _mm512_dpbf16_ps(sum[m][1], (__m512bh)_mm512_set1_epi32((int)*weight_high), high);
            }
        }
        for (int m = 0; m < num; m++)
            for (int i = 0; i < 2; i++) _mm512_storeu_ps(own[i] + m * 16, sum[m][i]);
    }
}

#define ADD_NIBBLES(N) \
    case N: \
        add_nibbles(N, dim, codes, later, rows, pairs, start, out, out_high); \
        break;

static void add_nibbles_of(int num, int dim, const uint8_t *codes, const char *const *later, int rows,
                           const uint32_t *const *pairs, const float *const *start, float *out, float *out_high) {
    switch (num) {
        ADD_NIBBLES(1) ADD_NIBBLES(2) ADD_NIBBLES(3) ADD_NIBBLES(4)
        ADD_NIBBLES(5) ADD_NIBBLES(6) ADD_NIBBLES(7) ADD_NIBBLES(8)
    }
}

/* fp16 or bf16 numbers as fp32; `filled` >= count of them, the rest 0. */
static void widen(int is_half, const uint16_t *from, int count, int filled, float *to) {
    for (int i = 0; i < filled; i += 16) {
        __mmask16 is_there = count - i >= 16 ? 0xFFFF : count <= i ? 0 : (1 << (count - i)) - 1;
        __m256i bits = _mm256_maskz_loadu_epi16(is_there, from + i);
        vec wide = is_half ? _mm512_cvtph_ps(bits) : (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        _mm512_storeu_ps(to + i, wide);
    }
}

/* fp16 steps and lows of ranges -> steps and middles, what code 7.5 means. The next ones are fetched. */
static void widen_ranges(const uint16_t *step, const uint16_t *low, int count, const uint16_t *next_step,
                         const uint16_t *next_low, float *const *steps_and_middles) {
    float *steps = steps_and_middles[0], *middles = steps_and_middles[1];
    for (int i = 0; i < count; i += 32) {
        _mm_prefetch(next_step + i, _MM_HINT_T1);
        _mm_prefetch(next_low + i, _MM_HINT_T1);
    }
    widen(1, step, count, count, steps);
    widen(1, low, count, count, middles);
    for (int i = 0; i < count; i++) middles[i] += 7.5f * steps[i];
}

/* Queries [dim][LANES] for keys middle + step (code - 7.5): q step as pairs of channels [dim / 2][LANES]; returns what
 * the scores start from, q middle. */
static __m256 fold_ranges(int dim, const float *query, const float *step, const float *middle, uint32_t *pairs) {
    vec start = _mm512_setzero_ps();
    for (int d = 0; d < dim; d += 2) {
        vec part = _mm512_loadu_ps(query + LANES * d);
        start = _mm512_fmadd_ps(part, two_of(middle + d, middle + d + 1), start);
        __m256i both = paired(_mm512_mul_ps(part, two_of(step + d, step + d + 1)));
        _mm256_storeu_si256((__m256i *)(pairs + LANES / 2 * d), both);
    }
    return _mm256_add_ps(lower(start), upper(start));
}

/* Weights [rows][LANES] for values middle + step (code - 7.5), one range a row, `stride` apart: w step as pairs of rows;
 * returns what the weights add to every channel of the range. */
static __m256 weigh_ranges(const float *weights, int rows, const float *step, const float *middle, int stride,
                           uint32_t *pairs) {
    vec start = _mm512_setzero_ps();
    for (int r = 0; r < rows; r += 2) {
        vec part = _mm512_loadu_ps(weights + LANES * r);
        start = _mm512_fmadd_ps(part, two_of(middle + r * stride, middle + (r + 1) * stride), start);
        __m256i both = paired(_mm512_mul_ps(part, two_of(step + r * stride, step + (r + 1) * stride)));
        _mm256_storeu_si256((__m256i *)(pairs + LANES / 2 * r), both);
    }
    return _mm256_add_ps(lower(start), upper(start));
}
