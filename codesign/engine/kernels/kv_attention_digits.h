/* Attention over rows of int8 codes in integers, beside kv_attention_tile.h: products of bytes, four to a lane (VNNI).
 *
 * What meets the codes goes as 16-bit integers in two digits of a byte, x = step (256 high + low): a query by its largest
 * channel (signed), the weights of a chunk times their rows' scales by the largest of them (unsigned). Sums are exact, so
 * the only errors are those of rounding to 16 bits: 2^-16 of the largest.
 */

/* Queries [num, dim] -> digits [dim / 4][2][LANES] of four channels each, steps [LANES], and what the scores start from:
 * keys are taken as code + 128, since one factor has to be unsigned. */
static void query_digits(int num, int dim, const float *query, uint32_t *digits, float *steps, int32_t *start) {
    memset(digits, 0, sizeof(uint32_t) * dim / 2 * LANES);
    for (int i = 0; i < LANES; i++) steps[i] = 0, start[i] = start[LANES + i] = 0;
    for (int m = 0; m < num; m++, query += dim) {
        vec most = _mm512_setzero_ps(), wrong = most; /* wrong: NaN where a channel is not finite */
        for (int d = 0; d < dim; d += 16) {
            vec part = _mm512_loadu_ps(query + d);
            most = _mm512_max_ps(most, _mm512_abs_ps(part));
            wrong = _mm512_fmadd_ps(part, _mm512_setzero_ps(), wrong);
        }
        float largest = _mm512_reduce_max_ps(most), inverse = largest > 0 ? 32512 / largest : 0;
        steps[m] = largest / 32512 + _mm512_reduce_add_ps(wrong);
        __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int d = 0; d < dim; d += 16) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(query + d), _mm512_set1_ps(inverse)));
            __m512i digit[2] = {_mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8)};
            digit[1] = _mm512_sub_epi32(whole, _mm512_slli_epi32(digit[0], 8));
            for (int i = 0; i < 2; i++) {
                uint32_t four[4];
                _mm_storeu_si128((__m128i *)four, _mm512_cvtepi32_epi8(digit[i]));
                for (int j = 0; j < 4; j++) digits[((d / 4 + j) * 2 + i) * LANES + m] = four[j];
                sums[i] = _mm512_add_epi32(sums[i], digit[i]);
            }
        }
        for (int i = 0; i < 2; i++) start[i * LANES + m] = -128 * _mm512_reduce_add_epi32(sums[i]);
    }
}

/* Codes + 128 of keys, once for all queries. */
static void make_unsigned(const uint8_t *codes, int count, uint8_t *out) {
    for (int i = 0; i < count; i += 32) {
        __m256i part = _mm256_loadu_si256((const __m256i *)(codes + i));
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_xor_si256(part, _mm256_set1_epi8((char)0x80)));
    }
}

/* scores [GROUP][LANES] of codes + 128 [GROUP, dim] with scales [GROUP]; `later` is fetched meanwhile. */
INLINE void score_codes_any(int dim, const uint8_t *codes, const float *row_scale, const uint32_t *digits,
                            const int32_t *start, __m256 scale, const uint8_t *later, float *scores) {
    __m256i first = _mm256_loadu_si256((const __m256i *)start), second = _mm256_loadu_si256((const __m256i *)start + 1);
    for (int half = 0; half < GROUP; half += 8) {
        const uint8_t *rows = codes + half * dim;
        __m256i high[8], low[8];
        for (int r = 0; r < 8; r++) high[r] = first, low[r] = second;
        for (int i = 0; i < dim / 4; i += 2) {
            _mm_prefetch(later + half * dim + 32 * i, _MM_HINT_T1);
            for (int j = i; j < i + 2; j++) {
                __m256i big = _mm256_loadu_si256((const __m256i *)digits + 2 * j);
                __m256i small = _mm256_loadu_si256((const __m256i *)digits + 2 * j + 1);
                for (int r = 0; r < 8; r++) {
                    int four;
                    memcpy(&four, rows + r * dim + 4 * j, 4);
                    high[r] = _mm256_dpbusd_epi32(high[r], _mm256_set1_epi32(four), big);
                    low[r] = _mm256_dpbusd_epi32(low[r], _mm256_set1_epi32(four), small);
                }
            }
        }
        for (int r = 0; r < 8; r++) {
            __m256 dot = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high[r]), _mm256_set1_ps(256), _mm256_cvtepi32_ps(low[r]));
            __m256 own = _mm256_mul_ps(scale, _mm256_broadcast_ss(row_scale + half + r));
            _mm256_storeu_ps(scores + LANES * (half + r), _mm256_mul_ps(dot, own));
        }
    }
}

static void score_codes(int dim, const uint8_t *codes, const float *row_scale, const uint32_t *digits,
                        const int32_t *start, __m256 scale, const uint8_t *later, float *scores) {
    if (dim == 64) score_codes_any(64, codes, row_scale, digits, start, scale, later, scores);
    else if (dim == 128) score_codes_any(128, codes, row_scale, digits, start, scale, later, scores);
    else score_codes_any(dim, codes, row_scale, digits, start, scale, later, scores);
}

/* Weights [rows][LANES], none above largest [LANES], times scales [rows] of the rows' values -> digits
 * [rows / 4][2][LANES] of four rows each, and by what their products count, [LANES]. */
static void weight_digits(const float *weights, int rows, __m256 largest, const float *row_scale, uint32_t *digits,
                          float *steps) {
    vec most = _mm512_set1_ps(1e-30f), wrong = _mm512_setzero_ps();
    for (int r = 0; r < rows; r += 16) {
        vec part = _mm512_loadu_ps(row_scale + r);
        most = _mm512_max_ps(most, part);
        wrong = _mm512_fmadd_ps(part, _mm512_setzero_ps(), wrong);
    }
    float top = _mm512_reduce_max_ps(most), nan_if_wrong = _mm512_reduce_add_ps(wrong);
    largest = _mm256_max_ps(largest, _mm256_set1_ps(1e-30f)); /* below, weights are as good as 0 */
    _mm256_storeu_ps(steps, _mm256_fmadd_ps(largest, _mm256_set1_ps(top / 65535), _mm256_set1_ps(nan_if_wrong)));
    vec inverse = twice(_mm256_div_ps(_mm256_set1_ps(65535 / top), largest));
    const __m256i bytes = _mm256_set1_epi32(0x00FF00FF);
    for (int r = 0; r < rows; r += 4) {
        __m512i whole[2];
        for (int i = 0; i < 2; i++) {
            vec scale = _mm512_insertf32x8(_mm512_set1_ps(row_scale[r + 2 * i]), _mm256_set1_ps(row_scale[r + 2 * i + 1]), 1);
            vec weight = _mm512_mul_ps(_mm512_loadu_ps(weights + LANES * (r + 2 * i)), inverse);
            whole[i] = _mm512_cvtps_epi32(_mm512_mul_ps(weight, scale));
        }
        __m512i both = _mm512_or_si512(whole[0], _mm512_slli_epi32(whole[1], 16)); /* rows r, r + 2 | r + 1, r + 3 */
        __m256i even = _mm512_castsi512_si256(both), odd = _mm512_extracti64x4_epi64(both, 1);
        __m256i high = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(even, 8), bytes), _mm256_andnot_si256(bytes, odd));
        __m256i low = _mm256_or_si256(_mm256_and_si256(even, bytes), _mm256_slli_epi32(_mm256_and_si256(odd, bytes), 8));
        _mm256_storeu_si256((__m256i *)(digits + r / 2 * LANES), high);
        _mm256_storeu_si256((__m256i *)(digits + r / 2 * LANES) + 1, low);
    }
}

/* Adds steps (digits of weights) (codes [rows, dim]) to out [4][LANES][16], 64 channels or those that `mask` has; lane
 * i of vector v is channel i / 4 * 16 + v * 4 + i % 4, so that swap_quarters puts them in order. */
INLINE void add_codes(int num, int dim, const uint8_t *codes, __mmask64 mask, int rows, const uint32_t *digits,
                      const float *steps, const char *const *later, float *out) {
    for (int v = 0; v < 4; v++) {
        __m512i high[LANES], low[LANES];
        for (int m = 0; m < num; m++) high[m] = low[m] = _mm512_setzero_si512();
        for (int r = 0; r < rows; r += 4) {
            __m512i row[4];
            for (int i = 0; i < 4; i++) row[i] = _mm512_maskz_loadu_epi8(mask, codes + (r + i) * dim);
            _mm_prefetch(later[r / GROUP] + (r % GROUP + v) * dim, _MM_HINT_T1);
            __m512i one = v < 2 ? _mm512_unpacklo_epi8(row[0], row[1]) : _mm512_unpackhi_epi8(row[0], row[1]);
            __m512i two = v < 2 ? _mm512_unpacklo_epi8(row[2], row[3]) : _mm512_unpackhi_epi8(row[2], row[3]);
            __m512i four = v % 2 ? _mm512_unpackhi_epi16(one, two) : _mm512_unpacklo_epi16(one, two);
            const uint32_t *own = digits + r / 2 * LANES;
            for (int m = 0; m < num; m++) {
                high[m] = _mm512_dpbusd_epi32(high[m], _mm512_set1_epi32((int)own[m]), four);
                low[m] = _mm512_dpbusd_epi32(low[m], _mm512_set1_epi32((int)own[LANES + m]), four);
            }
        }
        for (int m = 0; m < num; m++) {
            float *own = out + (v * LANES + m) * 16;
            vec sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[m]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low[m]));
            _mm512_storeu_ps(own, _mm512_fmadd_ps(sum, _mm512_set1_ps(steps[m]), _mm512_loadu_ps(own)));
        }
    }
}

#define ADD_CODES(N) \
    case N: \
        add_codes(N, dim, codes, mask, rows, digits, steps, later, out); \
        break;

static void add_codes_of(int num, int dim, const uint8_t *codes, __mmask64 mask, int rows, const uint32_t *digits,
                         const float *steps, const char *const *later, float *out) {
    switch (num) {
        ADD_CODES(1) ADD_CODES(2) ADD_CODES(3) ADD_CODES(4) ADD_CODES(5) ADD_CODES(6) ADD_CODES(7) ADD_CODES(8)
    }
}
