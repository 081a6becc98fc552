/* Packed codes -> the weights that they mean, as bf16 or fp32, for products of many rows of x with a slice of W.
 *
 * Plain loops, which the compiler makes vector code of. A value is computed in fp32 and rounded once.
 */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE uint16_t to_bf16(float value) { /* to nearest, ties to even; weights are finite */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_bits(uint16_t value, int is_half) {
    float wide;
    if (is_half) {
        _Float16 half;
        memcpy(&half, &value, 2);
        return (float)half;
    }
    uint32_t bits = (uint32_t)value << 16;
    memcpy(&wide, &bits, 4);
    return wide;
}

INLINE void store(void *out, long at, const float *values, long count, int is_bf16) {
    if (is_bf16)
        for (long i = 0; i < count; i++) ((uint16_t *)out)[at + i] = to_bf16(values[i]);
    else
        memcpy((float *)out + at, values, count * sizeof(float));
}

/* codes [rows, num_in] int8, scale [rows] -> out [rows, num_in]. */
void unpack_int8(const int8_t *codes, const float *scale, void *out, int is_bf16, long rows, long num_in) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const int8_t *own = codes + row * num_in;
        float factor = scale[row];
        if (is_bf16)
            for (long k = 0; k < num_in; k++) ((uint16_t *)out)[row * num_in + k] = to_bf16((float)own[k] * factor);
        else
            for (long k = 0; k < num_in; k++) ((float *)out)[row * num_in + k] = (float)own[k] * factor;
    }
}

#define CHUNK 1024 /* outputs at once, so that rows of `out` are written in order */

/* int4 in ATen's order: packed [outputs / block][num_in][block / 2], low nibbles the first half of a block's outputs.
 * pairs [groups, num_out, 2] from the first output on; w = (code - 8) scale + zero -> out [num_in, outputs]. */
INLINE void int4_blocks(int block, const uint8_t *packed, const uint16_t *pairs, int is_half, void *out, int is_bf16,
                        long outputs, long num_in, long num_out, long group_size) {
    int half = block / 2;
    long num_groups = num_in / group_size;
#pragma omp parallel for collapse(2) schedule(static)
    for (long g = 0; g < num_groups; g++)
        for (long first = 0; first < outputs; first += CHUNK) {
            long count = outputs - first < CHUNK ? outputs - first : CHUNK;
            float scale[CHUNK], middle[CHUNK], values[64];
            for (long n = 0; n < count; n++) {
                const uint16_t *pair = pairs + (g * num_out + first + n) * 2;
                scale[n] = from_bits(pair[0], is_half);
                middle[n] = from_bits(pair[1], is_half) - 8 * scale[n];
            }
            for (long k = g * group_size; k < (g + 1) * group_size; k++)
                for (long b = 0; b < count; b += block) {
                    const uint8_t *codes = packed + ((first + b) / block * num_in + k) * half;
                    const float *s = scale + b, *m = middle + b;
                    for (int n = 0; n < half; n++) values[n] = (float)(codes[n] & 15) * s[n] + m[n];
                    for (int n = 0; n < half; n++) values[half + n] = (float)(codes[n] >> 4) * s[half + n] + m[half + n];
                    store(out, k * outputs + first + b, values, block, is_bf16);
                }
        }
}

void unpack_int4(const uint8_t *packed, const uint16_t *pairs, int is_half, void *out, int is_bf16, int block,
                 long outputs, long num_in, long num_out, long group_size) {
    if (block == 64)
        int4_blocks(64, packed, pairs, is_half, out, is_bf16, outputs, num_in, num_out, group_size);
    else
        int4_blocks(32, packed, pairs, is_half, out, is_bf16, outputs, num_in, num_out, group_size);
}

#define MAX_IN 32768

/* values [num_in] = codes scale + middle, group by group; group_size is a constant where it is a usual one. */
INLINE void scale_groups(long group_size, const uint8_t *codes, const float *scale, const float *middle, float *values,
                         long num_in) {
    for (long g = 0; g < num_in / group_size; g++)
        for (long k = g * group_size; k < (g + 1) * group_size; k++) values[k] = (float)codes[k] * scale[g] + middle[g];
}

/* packed [rows, num_in bits / 8] as bit_packed.py lays codes of 2, 3, 4 or 8 bits out; w = code scale + middle,
 * scale and middle [rows, num_in / group_size] -> out [rows, num_in], num_in a multiple of 8 and at most MAX_IN. */
void unpack_bits(const uint8_t *packed, int bits, const float *scale, const float *middle, void *out, int is_bf16,
                 long rows, long num_in, long group_size) {
    uint32_t four_of[256]; /* four codes of two bits, one a byte */
    uint64_t eight_of[256]; /* eight third bits, in their place */
    for (int byte = 0; byte < 256; byte++) {
        four_of[byte] = 0, eight_of[byte] = 0;
        for (int place = 0; place < 4; place++) four_of[byte] |= (uint32_t)(byte >> 2 * place & 3) << 8 * place;
        for (int place = 0; place < 8; place++) eight_of[byte] |= (uint64_t)(byte >> place & 1) << (8 * place + 2);
    }
    long num_groups = num_in / group_size;
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        uint8_t codes[MAX_IN];
        float values[MAX_IN];
        const uint8_t *low = packed + row * num_in * bits / 8, *high = low + num_in / 4;
        if (bits == 8) memcpy(codes, low, num_in);
        if (bits == 4)
            for (long k = 0; k < num_in; k += 2) codes[k] = low[k / 2] & 15, codes[k + 1] = low[k / 2] >> 4;
        if (bits < 4)
            for (long k = 0; k < num_in; k += 8) {
                uint64_t eight = four_of[low[k / 4]] | (uint64_t)four_of[low[k / 4 + 1]] << 32;
                if (bits == 3) eight |= eight_of[high[k / 8]];
                memcpy(codes + k, &eight, 8);
            }
        const float *own = scale + row * num_groups, *offset = middle + row * num_groups;
        switch (group_size) {
            case 16: scale_groups(16, codes, own, offset, values, num_in); break;
            case 32: scale_groups(32, codes, own, offset, values, num_in); break;
            case 64: scale_groups(64, codes, own, offset, values, num_in); break;
            default: scale_groups(group_size, codes, own, offset, values, num_in);
        }
        store(out, row * num_in, values, num_in, is_bf16);
    }
}

/* packed [rows, num_in / 2], the even input's code in the low bits; w = levels[code] scale, scale [rows, num_in / 64]
 * -> out [rows, num_in], num_in a multiple of 64 and at most MAX_IN. */
void unpack_levels(const uint8_t *packed, const float *levels, const float *scale, void *out, int is_bf16, long rows,
                   long num_in) {
    float two_of[256][2];
    for (int byte = 0; byte < 256; byte++) two_of[byte][0] = levels[byte & 15], two_of[byte][1] = levels[byte >> 4];
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const uint8_t *own = packed + row * num_in / 2;
        float values[MAX_IN];
        for (long k = 0; k < num_in; k += 2) memcpy(values + k, two_of[own[k / 2]], 8);
        for (long k = 0; k < num_in; k += 64)
            for (int i = 0; i < 64; i++) values[k + i] *= scale[(row * num_in + k) / 64];
        store(out, row * num_in, values, num_in, is_bf16);
    }
}
