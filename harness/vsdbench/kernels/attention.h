/* A layer's attention: rotary embedding, the cache, scores, softmax and the mean of values. */
#pragma once

#include "products.h"
#include "scores.h"
#include "threads.h"

#define MIXED 64 /* keys whose values are mixed before the next queries: they stay in the first cache */

typedef struct {
    const float *norm, *mlp_norm, *query_norm, *key_norm; /* all but the second NULL where there is no such norm */
    Weight qkv, out, gate, up, down;
    int32_t mask; /* which of the call's masks it attends by */
    int32_t keep; /* which of the call's outputs its input goes to, or -1 */
} Layer;

typedef struct {
    const Layer* layers;
    const float* last_norm; /* NULL: no last norm */
    int32_t num_layers, num_masks, hidden, heads, groups, width, inner;
    float eps, scaling;
    int32_t is_bf16; /* of cache, inputs and outputs; computed is float32 */
} Model;

/* A sequence of a call: some of its rows, in order, and where its keys and values are. Offsets are of elements. */
typedef struct {
    int64_t first, count; /* rows */
    int64_t length;       /* keys so far; new ones are written behind them */
    int64_t place;        /* of its first head's first key, from the start of a layer */
    int64_t head_stride;  /* from one head's to the next */
    int64_t mask_row;     /* of its first row, in the masks */
} Sequence;

typedef struct {
    const void* embedded;   /* [rows, hidden] */
    const void* entered;    /* [rows, inputs of qkv], what enters the attention of a layer without a norm, or NULL */
    const float *cos, *sin; /* [rows, width] */
    const void* masks[2]; /* [mask rows, keys], of the model's dtype: seen where it is 0; NULL: all up to the own one */
    int64_t mask_strides[2]; /* elements from one row to the next */
    void *keys, *values;
    int64_t layer_stride; /* elements from one layer's keys or values to the next */
    const Sequence* sequences;
    void* kept[4];    /* [rows, hidden] each */
    void *out, *last; /* [rows, hidden] before and after the last norm; or NULL */
    float* work;      /* of `workspace` floats */
    int32_t rows, num_sequences, threads;
} Call;

/* Root-mean-square norm; the sum of squares is of lanes, then of the lanes in order. */
static void normalise(const float* x, const float* weight, int count, float eps, float* out) {
    vec squares = {0};
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec part = get(x + i);
        squares += part * part;
    }
    float sum = total(squares);
    for (int j = i; j < count; j++) sum += x[j] * x[j];
    float factor = 1.0f / sqrtf(sum / (float)count + eps);
    for (int j = 0; j < count; j++) out[j] = weight[j] * (x[j] * factor);
}

static void rotate(float* head, const float* cos, const float* sin, int width, float factor) {
    int half = width / 2;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = (a * cos[i] - b * sin[i]) * factor;
        head[i + half] = (b * cos[i + half] + a * sin[i + half]) * factor;
    }
}

/* Add to out [PANEL] of some queries the values of `count` keys, `width` apart, by their shares. */
INLINE void mix(const int queries, const int vectors, const void* values, int64_t place, int width, int is_bf16,
                int count, const float* const* shares, float* const* out) {
    vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[q][v] = get(out[q] + v * LANES);
    for (int k = 0; k < count; k++, place += width) {
        vec value[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) value[v] = load(values, place + v * LANES, is_bf16);
#pragma GCC unroll 8
        for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[q][v] += shares[q][k] * value[v];
    }
#pragma GCC unroll 8
    for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) put(out[q] + v * LANES, sums[q][v]);
}

#define CASE_MIX(N)                                                                         \
    case N:                                                                                 \
        if (vectors < VECTORS)                                                              \
            for (int v = 0; v < vectors; v++) {                                             \
                float* parts[ROWS];                                                         \
                for (int q = 0; q < N; q++) parts[q] = out[q] + v * LANES;                  \
                mix(N, 1, values, place + v * LANES, width, is_bf16, count, shares, parts); \
            }                                                                               \
        else                                                                                \
            mix(N, VECTORS, values, place, width, is_bf16, count, shares, out);             \
        break;

static void mix_any(int queries, int vectors, const void* values, int64_t place, int width, int is_bf16, int count,
                    const float* const* shares, float* const* out) {
    switch (queries) {
        CASE_MIX(1)
        CASE_MIX(2)
        CASE_MIX(3)
#if ROWS > 3
        CASE_MIX(4)
        CASE_MIX(5)
        CASE_MIX(6)
#endif
    }
}

typedef struct {
    Meeting* meeting;
    float *x, *qkv, *mixed, *gate, *up, *scores, *after; /* shared: [rows, ...]; scores [rows * heads, padded keys] */
    float* factors;                                      /* [rows * heads]: of their softmax */
    int32_t *seen[2], *num_seen[2], *first_gap[2];       /* [rows, keys], [rows], [rows]: keys a row sees, by mask */
    float *normed, *turned;                              /* a thread's own */
    const Sequence** owners;                             /* [rows] */
    int64_t padded;
} Work;

static void find_seen(const Model* model, const Call* call, Work* work, int mask, int r) {
    const Sequence* sequence = work->owners[r];
    int total_keys = (int)(sequence->length + sequence->count), found = 0, row = (int)(r - sequence->first);
    work->first_gap[mask][r] = total_keys;
    int32_t* list = work->seen[mask] + (int64_t)r * work->padded;
    int64_t base = call->mask_strides[mask] * (sequence->mask_row + row);
    for (int k = 0; k < total_keys; k++) {
        int visible = !call->masks[mask] ? k <= sequence->length + row
                      : model->is_bf16   ? ((const uint16_t*)call->masks[mask])[base + k] == 0
                                         : ((const float*)call->masks[mask])[base + k] == 0.0f;
        if (visible) list[found++] = k;
        if (!visible && found == k) work->first_gap[mask][r] = k;
    }
    work->num_seen[mask][r] = found;
}

/* Turn queries and new keys of one row's head, and write keys and values into the cache. */
static void enter_cache(const Model* model, const Layer* layer, const Call* call, int64_t cache, Work* work, int r,
                        int head) {
    int width = model->width, kind = head < model->heads ? 0 : head < model->heads + model->groups ? 1 : 2;
    float* values = work->qkv + (int64_t)r * (model->heads + 2 * model->groups) * width + (int64_t)head * width;
    int group = (head - model->heads) % model->groups;
    const Sequence* sequence = work->owners[r];
    int64_t place = cache + sequence->place + group * sequence->head_stride;
    place += (sequence->length + r - sequence->first) * width;
    if (kind == 2) {
        write_row(call->values, place, width, model->is_bf16, values);
        return;
    }
    const float* norm = kind ? layer->key_norm : layer->query_norm;
    if (norm) normalise(values, norm, width, model->eps, values);
    rotate(values, call->cos + (int64_t)r * width, call->sin + (int64_t)r * width, width, kind ? 1.0f : model->scaling);
    if (kind) write_row(call->keys, place, width, model->is_bf16, values);
}

/* Where, among all rows' heads, a query of a group is: its queries are the heads of a sequence's rows, row by row. */
INLINE int64_t head_of(const Model* model, const Sequence* sequence, int group, int query) {
    int each = model->heads / model->groups;
    return (sequence->first + query / each) * model->heads + group * each + query % each;
}

/* Scores of all queries of a group with BLOCK keys from `first` on. */
static void score_block(const Model* model, const Call* call, const Sequence* sequence, int64_t cache, Work* work,
                        int group, int first) {
    int width = model->width, each = model->heads / model->groups, queries = (int)sequence->count * each;
    int total_keys = (int)(sequence->length + sequence->count), wide = (model->heads + 2 * model->groups) * width;
    int few = queries <= 2 * FEW;
    int64_t base = cache + sequence->place + group * sequence->head_stride + (int64_t)first * width;
    for (int half = 0; half < BLOCK && !few; half += LANES)
        for (int d = 0; d < width; d += LANES) {
            vec block[LANES];
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++) {
                int key = half + k < total_keys - first ? half + k : total_keys - first - 1;
                block[k] = load(call->keys, base + (int64_t)key * width + d, model->is_bf16);
                fetch(call->keys, base + (int64_t)(key + BLOCK) * width + d, model->is_bf16);
            }
            transpose(block);
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++) *(vec*)(work->turned + (d + k) * BLOCK + half) = block[k];
        }
    int most = few ? FEW : QUERIES;
    for (int q = 0; q < queries; q += most) {
        const float* these[QUERIES > FEW ? QUERIES : FEW];
        float* scores[QUERIES > FEW ? QUERIES : FEW];
        int count = queries - q < most ? queries - q : most;
        for (int i = 0; i < count; i++) {
            these[i] = work->qkv + (sequence->first + (q + i) / each) * wide + (group * each + (q + i) % each) * width;
            scores[i] = work->scores + head_of(model, sequence, group, q + i) * work->padded + first;
        }
#define CASE_SCORE(N)                                 \
    case N:                                           \
        score(N, these, work->turned, width, scores); \
        break;
#define CASE_FEW(N)                                                                                            \
    case N:                                                                                                    \
        if (model->is_bf16)                                                                                    \
            score_few(N, these, call->keys, base + (int64_t)half * width, total_keys - first - half, width, 1, \
                      scores);                                                                                 \
        else                                                                                                   \
            score_few(N, these, call->keys, base + (int64_t)half * width, total_keys - first - half, width, 0, \
                      scores);                                                                                 \
        break;
        for (int half = 0; half < BLOCK && few; half += LANES) {
            if (first + half >= total_keys) break;
            switch (count) {
                CASE_FEW(1)
                CASE_FEW(2)
                CASE_FEW(3)
                CASE_FEW(4)
            }
            for (int i = 0; i < count; i++) scores[i] += LANES;
        }
        if (few) continue;
        switch (count) {
            CASE_SCORE(1)
            CASE_SCORE(2)
            CASE_SCORE(3)
#if QUERIES > 3
            CASE_SCORE(4)
            CASE_SCORE(5)
            CASE_SCORE(6)
#endif
        }
    }
}

/* Turn scores into e to their power, 0 where a key is not seen, and return what divides them. Those of seen keys are
 * brought together meanwhile, so that nothing depends on what lies between them. */
static float soften(float* scores, const int32_t* seen, int count, int first_gap, int total_keys) {
    vec highest = (vec){0} - INFINITY;
    int j = 0;
    for (; j + LANES <= first_gap; j += LANES) {
        highest = larger(get(scores + j), highest);
    }
    float largest = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) largest = highest[lane] > largest ? highest[lane] : largest;
    for (; j < count; j++) {
        float value = scores[seen[j]]; /* in place: seen[j] >= j */
        scores[j] = value;
        largest = value > largest ? value : largest;
    }
    int padded = (count + LANES - 1) / LANES * LANES;
    for (j = count; j < padded; j++) scores[j] = -INFINITY;
    vec sums = {0};
    for (j = 0; j < padded; j += LANES) {
        vec part = exponential(get(scores + j) - largest);
        if (j + LANES > count)
            for (int lane = count - j; lane < LANES; lane++) part[lane] = 0;
        put(scores + j, part);
        sums += part;
    }
    for (j = count; j < total_keys; j++) scores[j] = 0;
    for (j = count - 1; j >= first_gap; j--) {
        float value = scores[j];
        scores[j] = 0;
        scores[seen[j]] = value;
    }
    return 1.0f / total(sums);
}

/* Means of values by the softmax of scores, of the queries [begin, end) of a group of a sequence. Keys outermost, as
 * many as stay in the first cache: each is loaded once for several queries. */
static void mix_values(const Model* model, const Layer* layer, const Call* call, const Sequence* sequence,
                       int64_t cache, Work* work, int group, int begin, int end) {
    int width = model->width, each = model->heads / model->groups;
    int total_keys = (int)(sequence->length + sequence->count), from = total_keys;
    int64_t base = cache + sequence->place + group * sequence->head_stride;
    for (int q = begin; q < end; q++) {
        int64_t head = head_of(model, sequence, group, q), r = sequence->first + q / each;
        const int32_t* seen = work->seen[layer->mask] + r * work->padded;
        int count = work->num_seen[layer->mask][r];
        work->factors[head] =
            soften(work->scores + head * work->padded, seen, count, work->first_gap[layer->mask][r], total_keys);
        if (count && seen[0] < from) from = seen[0];
        memset(work->mixed + head * width, 0, 4 * (size_t)width);
    }
    for (int first = from / MIXED * MIXED; first < total_keys; first += MIXED) {
        int count = total_keys - first < MIXED ? total_keys - first : MIXED;
        for (int d = 0; d < width; d += PANEL) {
            int vectors = (width - d) / LANES < VECTORS ? (width - d) / LANES : VECTORS;
            for (int q = begin; q < end; q += ROWS) {
                const float* shares[ROWS];
                float* out[ROWS];
                int queries = end - q < ROWS ? end - q : ROWS;
                for (int i = 0; i < queries; i++) {
                    int64_t head = head_of(model, sequence, group, q + i);
                    shares[i] = work->scores + head * work->padded + first;
                    out[i] = work->mixed + head * width + d;
                }
                mix_any(queries, vectors, call->values, base + (int64_t)first * width + d, width, model->is_bf16, count,
                        shares, out);
            }
        }
    }
    for (int q = begin; q < end; q++) {
        int64_t head = head_of(model, sequence, group, q);
        for (int d = 0; d < width; d++) work->mixed[head * width + d] *= work->factors[head];
    }
}

/* The scores that one thread takes: its share of all sequences' blocks of keys. */
static void score_share(const Model* model, const Call* call, int64_t cache, Work* work, int thread, int threads) {
    int64_t all = 0, before = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < call->num_sequences; i++) {
            const Sequence* sequence = call->sequences + i;
            int64_t blocks = (sequence->length + sequence->count + BLOCK - 1) / BLOCK, items = model->groups * blocks;
            if (!pass) {
                all += items;
                continue;
            }
            int64_t begin = all * thread / threads - before, end = all * (thread + 1) / threads - before;
            for (int64_t item = begin > 0 ? begin : 0; item < (end < items ? end : items); item++)
                score_block(model, call, sequence, cache, work, (int)(item / blocks), (int)(item % blocks) * BLOCK);
            before += items;
        }
}

/* The means that one thread takes: its share of all queries, counted by their keys. */
static void mix_share(const Model* model, const Layer* layer, const Call* call, int64_t cache, Work* work, int thread,
                      int threads) {
    int64_t all = 0, before = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < call->num_sequences; i++) {
            const Sequence* sequence = call->sequences + i;
            int64_t keys = sequence->length + sequence->count, queries = sequence->count * model->heads;
            if (!pass) {
                all += queries * keys;
                continue;
            }
            int64_t begin = (all * thread / threads - before + keys - 1) / keys;
            int64_t end = (all * (thread + 1) / threads - before + keys - 1) / keys;
            begin = begin > 0 ? begin : 0;
            end = end < queries ? end : queries;
            int64_t each = queries / model->groups;
            for (int64_t group = begin / each; group * each < end; group++) {
                int64_t last = end - group * each, first = begin - group * each;
                mix_values(model, layer, call, sequence, cache, work, (int)group, (int)(first > 0 ? first : 0),
                           (int)(last < each ? last : each));
            }
            before += queries * keys;
        }
}
