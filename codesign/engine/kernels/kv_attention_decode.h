/* Codes of fp8 and int4 as bf16, exact, for kv_attention_tile.h; scales and ranges are left to queries and weights. */

/* fp8 (e4m3) codes [rows, dim]: 2^-8 of their value, subnormals too (as fp16 they mean that). */
static void decode_fp8(const uint8_t *codes, const uint8_t *later, int count, uint16_t *out) {
    const __m512i sign = _mm512_set1_epi16((short)0x8000), rest = _mm512_set1_epi16(0x3F80);
    for (int i = 0; i < count; i += 32) {
        __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + i)));
        if (i % 64 == 0) _mm_prefetch(later + i, _MM_HINT_T1);
        __m512i half = _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(wide, 8), sign),
                                       _mm512_and_si512(_mm512_slli_epi16(wide, 7), rest));
        vec low = _mm512_cvtph_ps(_mm512_castsi512_si256(half)), high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* int4 codes [rows, dim / 2] as code - 7.5, which rounding of what it meets harms less than code. */
static void decode_int4(const uint8_t *codes, const uint8_t *later, int rows, int dim, uint16_t *out) {
    const __m512i bf16_of = _mm512_broadcast_i64x4(_mm256_setr_epi16( /* twice: a permutation looks at five bits */
        (short)0xC0F0, (short)0xC0D0, (short)0xC0B0, (short)0xC090, (short)0xC060, (short)0xC020, (short)0xBFC0,
        (short)0xBF00, 0x3F00, 0x3FC0, 0x4020, 0x4060, 0x4090, 0x40B0, 0x40D0, 0x40F0));
    for (int r = 0; r < rows; r++)
        for (int d = 0; d < dim / 2; d += 32) {
            const uint8_t *from = codes + r * dim / 2 + d;
            __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
            if (r % 2 == 0) _mm_prefetch(later + (from - codes), _MM_HINT_T1);
            __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), bf16_of);
            _mm512_storeu_si512(out + r * dim + d, _mm512_permutexvar_epi16(wide, bf16_of));
            _mm512_storeu_si512(out + r * dim + dim / 2 + d, high);
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

/* fp16 steps and lows of ranges -> steps and middles, what code 7.5 means. */
static void widen_ranges(const uint16_t *step, const uint16_t *low, int count, float *steps, float *middles) {
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
