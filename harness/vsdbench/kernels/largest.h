/* The largest of many: of a draft's log-probabilities a tree needs a few a row, and a sort looks at all. */
#pragma once

#include "vectors.h"

#define STRETCH (16 * LANES) /* numbers that are passed over at once where none of them is large enough */

/* Put a number where it belongs among the k largest so far, behind its equals; it is larger than the last of them. */
INLINE void insert(float* values, int64_t* places, int at, float value, int64_t place) {
    for (; at > 0 && values[at - 1] < value; at--) values[at] = values[at - 1], places[at] = places[at - 1];
    values[at] = value, places[at] = place;
}

/* The k largest of each of some rows [rows, count] and where they stand: the largest first, of equals the first. */
void largest(const float* x, int32_t rows, int32_t count, int32_t k, float* values, int64_t* places) {
    for (int r = 0; r < rows; r++, x += count, values += k, places += k) {
        for (int i = 0; i < k; i++) insert(values, places, i, x[i], i);
        for (int from = k, to; from < count; from = to) {
            to = from + STRETCH < count ? from + STRETCH : count;
            if (to - from == STRETCH) {
                vec most = get(x + from);
                for (int i = LANES; i < STRETCH; i += LANES) most = larger(get(x + from + i), most);
                int above = 0;
                for (int i = 0; i < LANES; i++) above |= most[i] > values[k - 1];
                if (!above) continue;
            }
            for (int i = from; i < to; i++)
                if (x[i] > values[k - 1]) insert(values, places, k - 1, x[i], i);
        }
    }
}
