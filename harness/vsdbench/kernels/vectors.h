/* Vectors as wide as the machine's registers, and what is computed with them: bfloat16 and back, exponentials, sums. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 6 /* rows multiplied at once: ROWS * VECTORS accumulators stay in registers */
#elif defined(__AVX__)
#define LANES 8
#define ROWS 3
#else
#define LANES 4
#define ROWS 6
#endif
#define VECTORS 4
#define PANEL (VECTORS * LANES)
#define STREAM (2 * LANES) /* outputs whose weights lie together, input by input */

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t loose_bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vec get(const float* from) { return (vec)(*(const loose*)from); }
INLINE void put(float* to, vec values) { *(loose*)to = (loose)values; }

INLINE float to_float(uint16_t value) {
    uint32_t wide = (uint32_t)value << 16;
    float result;
    memcpy(&result, &wide, 4);
    return result;
}

INLINE uint16_t to_bf16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return (uint16_t)((wide >> 16) | 64); /* not a number */
    return (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

INLINE vec load(const void* base, int64_t index, int is_bf16) {
    if (!is_bf16) return get((const float*)base + index);
    bits wide = __builtin_convertvector(*(const halves*)((const uint16_t*)base + index), bits);
    return (vec)(wide << 16);
}

static void read_row(const void* base, int64_t index, int count, int is_bf16, float* out) {
    if (!is_bf16) {
        memcpy(out, (const float*)base + index, 4 * (size_t)count);
        return;
    }
    for (int i = 0; i < count; i++) out[i] = to_float(((const uint16_t*)base)[index + i]);
}

static void write_row(void* base, int64_t index, int count, int is_bf16, const float* row) {
    if (!is_bf16) {
        memcpy((float*)base + index, row, 4 * (size_t)count);
        return;
    }
    for (int i = 0; i < count; i++) ((uint16_t*)base)[index + i] = to_bf16(row[i]);
}

INLINE vec larger(vec a, vec b) {
    ints above = a > b;
    return (vec)(((ints)a & above) | ((ints)b & ~above));
}

/* e to the power of x: 2 to a whole number by its exponent bits, the rest by a polynomial; off by 2 units at most. */
INLINE vec exponential(vec x) {
    const vec low = (vec){} - 87.0f, high = (vec){} + 88.0f;
    x = -larger(-high, -larger(x, low));
    const vec shift = (vec){} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vec whole = (x * 1.44269504088896341f + shift) - shift;
    vec rest = x - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    vec sum = (vec){} + 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    ints power = (__builtin_convertvector(whole, ints) + 127) << 23;
    return sum * (vec)power;
}

/* The logarithm of normal numbers above 0: the power by its bits, the rest by a polynomial; off by 2 units at most. */
INLINE vec logarithm(vec x) {
    ints power = (ints)((bits)x >> 23) - 126;
    vec rest = (vec)(((bits)x & 0x007fffff) | 0x3f000000); /* from 1/2 to 1 */
    ints below = rest < 0.707106781186547524f;
    power += below; /* which is -1 where it holds */
    rest = rest + (vec)((ints)rest & below) - 1.0f;
    vec sum = (vec){} + 7.0376836292e-2f;
    sum = sum * rest - 1.1514610310e-1f;
    sum = sum * rest + 1.1676998740e-1f;
    sum = sum * rest - 1.2420140846e-1f;
    sum = sum * rest + 1.4249322787e-1f;
    sum = sum * rest - 1.6668057665e-1f;
    sum = sum * rest + 2.0000714765e-1f;
    sum = sum * rest - 2.4999993993e-1f;
    sum = sum * rest + 3.3333331174e-1f;
    vec square = rest * rest, whole = __builtin_convertvector(power, vec);
    sum = sum * rest * square + whole * -2.12194440e-4f - 0.5f * square;
    return rest + sum + whole * 0.693359375f;
}

INLINE vec silu(vec x) { return x / (1.0f + exponential(-x)); }

INLINE float total(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
