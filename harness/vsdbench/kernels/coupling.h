/* What a drafter expects that knows the numbers of the draw: `decoding/coupling.py` says why. */
#pragma once

#include "vectors.h"

/* Gumbel noise of numbers that stand for (number + 1/2) / 2^32, large where they are small. */
INLINE vec gumbel(vec number) {
    const vec most = (vec){} + 0.99999994f;
    vec u = -larger(-(number + 0.5f) * 0x1p-32f, -most);
    /* -log(1 - u), by its series where 1 - u would round */
    vec series = u * (1.0f + u * (0.5f + u * (0.333333333f + u * (0.25f + u * 0.2f))));
    ints small = u < 0.0625f;
    vec wait = (vec)(((ints)series & small) | ((ints)-logarithm(1.0f - u) & ~small));
    return -logarithm(wait);
}

/* The logarithm of the softmax of scores * factor + weight * noise, for rows of scores [rows, count] that share their
 * noise, which is that of the numbers at `ids`. Work holds 2 * (count + LANES) floats. */
void informed(const float* scores, int32_t rows, int32_t count, const uint32_t* numbers, const int64_t* ids,
              float factor, float weight, float* work, float* out) {
    int padded = (count + LANES - 1) / LANES * LANES;
    float *noise = work, *row = work + padded;
    for (int i = 0; i < padded; i++) noise[i] = i < count ? (float)numbers[ids[i]] : 0;
    for (int i = 0; i < padded; i += LANES) put(noise + i, weight * gumbel(get(noise + i)));
    for (int r = 0; r < rows; r++, scores += count, out += count) {
        memcpy(row, scores, 4 * (size_t)count);
        for (int i = count; i < padded; i++) row[i] = -INFINITY;
        vec most = (vec){} - INFINITY;
        for (int i = 0; i < padded; i += LANES) {
            vec x = get(row + i) * factor + get(noise + i);
            put(row + i, x);
            most = larger(x, most);
        }
        float top = most[0];
        for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
        vec sums = {};
        for (int i = 0; i < padded; i += LANES) sums += exponential(get(row + i) - top);
        float shift = top + logf(total(sums));
        for (int i = 0; i < count; i++) out[i] = row[i] - shift;
    }
}
