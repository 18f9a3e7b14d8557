/* Products of queries with keys: of many with keys that are turned for it, of few with keys as they lie. */
#pragma once

#include "vectors.h"

#define BLOCK (2 * LANES)        /* keys scored at once */
#define QUERIES ROWS             /* with as many queries: four accumulators each */
#define FEW 4                    /* queries that keys are multiplied with as they lie */
#define DEPTH (ROWS > 3 ? 4 : 2) /* vectors of a key that are multiplied with those of FEW queries in registers */

/* Where in two vectors, to be shuffled, the lanes are whose number lacks `size`, and the lanes `size` behind them. A
 * macro, not a function: a shuffle is fast only where the compiler sees its numbers. */
#define NEIGHBOURS(size, low, high)                            \
    ints low, high;                                            \
    for (int lane = 0; lane < LANES; lane++) {                 \
        low[lane] = lane & size ? LANES + lane - size : lane;  \
        high[lane] = lane & size ? LANES + lane : lane + size; \
    }

/* Transpose LANES x LANES values in registers: neighbours change places, then neighbouring pairs, and so on. */
INLINE void transpose(vec* rows) {
#pragma GCC unroll 4
    for (int size = 1; size < LANES; size *= 2) {
        NEIGHBOURS(size, low, high)
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++) {
            if (row & size) continue;
            vec a = rows[row], b = rows[row + size];
            rows[row] = __builtin_shuffle(a, b, low);
            rows[row + size] = __builtin_shuffle(a, b, high);
        }
    }
}

/* A score is summed lane by lane, and then neighbouring lanes, neighbouring pairs, and so on. Both ways of computing it
 * keep to that order, so that a query has the same scores alone and among many. */

/* Scores of some queries [width] with BLOCK keys, those turned to [width][BLOCK]. */
INLINE void score(const int count, const float* const* queries, const float* keys, int width, float* const* scores) {
    vec upper[4][QUERIES][2]; /* sums of 2, 4, 8 ... lanes that wait for their neighbours */
#pragma GCC unroll 8
    for (int lane = 0; lane < LANES; lane += 2) {
        vec sums[QUERIES][2][2];
#pragma GCC unroll 6
        for (int q = 0; q < count; q++)
            for (int next = 0; next < 2; next++) sums[q][next][0] = sums[q][next][1] = (vec){0};
        for (int d = lane; d < width; d += LANES)
#pragma GCC unroll 2
            for (int next = 0; next < 2; next++) {
                const float* place = keys + (d + next) * BLOCK;
                vec first = *(const vec*)place, second = *(const vec*)(place + LANES);
#pragma GCC unroll 6
                for (int q = 0; q < count; q++) {
                    sums[q][next][0] += queries[q][d + next] * first;
                    sums[q][next][1] += queries[q][d + next] * second;
                }
            }
#pragma GCC unroll 6
        for (int q = 0; q < count; q++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                vec sum = sums[q][0][half] + sums[q][1][half];
                int level = 0;
                for (int size = 2; size < LANES && (lane & size); size *= 2) sum = upper[level++][q][half] + sum;
                if (lane + 2 < LANES)
                    upper[level][q][half] = sum;
                else
                    put(scores[q] + half * LANES, sum);
            }
    }
}

/* Ask for what will be read later. */
INLINE void fetch(const void* base, int64_t index, int is_bf16) {
    __builtin_prefetch((const char*)base + index * (is_bf16 ? 2 : 4), 0, 3);
}

/* Add to sums [count][LANES] the products of a few queries with LANES keys, `vectors` of each from the d-th number on.
 */
INLINE void multiply_few(const int count, const int vectors, const float* const* queries, const void* keys,
                         int64_t place, int left, int width, int d, int is_bf16, vec (*sums)[LANES]) {
    vec asked[FEW][DEPTH];
#pragma GCC unroll 4
    for (int q = 0; q < count; q++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) asked[q][v] = get(queries[q] + d + v * LANES);
    for (int k = 0; k < LANES; k++) {
        vec key[DEPTH];
        int64_t start = place + (int64_t)(k < left ? k : left - 1) * width + d;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) key[v] = load(keys, start + v * LANES, is_bf16);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) fetch(keys, start + v * LANES + (int64_t)LANES * width, is_bf16);
#pragma GCC unroll 4
        for (int q = 0; q < count; q++) {
            vec sum = d ? sums[q][k] : (vec){0};
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum += asked[q][v] * key[v];
            sums[q][k] = sum;
        }
    }
}

/* Scores of a few queries [width] with LANES keys as they lie, of which `left` are there: the last one stands for
 * others. */
INLINE void score_few(const int count, const float* const* queries, const void* keys, int64_t place, int left,
                      int width, int is_bf16, float* const* scores) {
    vec sums[FEW][LANES];
    int d = 0;
    for (; d + DEPTH * LANES <= width; d += DEPTH * LANES)
        multiply_few(count, DEPTH, queries, keys, place, left, width, d, is_bf16, sums);
    for (; d < width; d += LANES) multiply_few(count, 1, queries, keys, place, left, width, d, is_bf16, sums);
#pragma GCC unroll 4
    for (int q = 0; q < count; q++) {
#pragma GCC unroll 4
        for (int size = 1; size < LANES; size *= 2) {
            NEIGHBOURS(size, low, high)
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k += 2 * size) {
                vec a = sums[q][k], b = sums[q][k + size];
                sums[q][k] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
            }
        }
        put(scores[q], sums[q][0]);
    }
}
