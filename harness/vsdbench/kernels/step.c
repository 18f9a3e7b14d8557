/* The decode step of a small language model on a CPU: matrix products of few rows, and whole decoder layers.
 *
 * A step reads every weight once, so it can take no longer than memory does, if the products keep up: a weight is
 * loaded once and multiplied with all rows while it is in a register. Weights are laid out in streams of outputs, two
 * of which are read side by side. All layers run in one parallel region; between them threads wait for each
 * other, and nothing else happens.
 *
 * Every row is computed by the same operations in the same order, however many rows there are beside it and wherever
 * its keys lie in the cache. So a token verified within a tree has the logits, bit by bit, that it has when it is
 * decoded alone.
 *
 * Plain C with GCC's vector extensions: compiled for the machine it runs on, with any width of registers.
 */

#include <sched.h>
#include <stdatomic.h>

#include "products.h"

#define SPINS 20000 /* some milliseconds */

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

typedef struct {
    const void* embedded;   /* [rows, hidden] */
    const void* entered;    /* [rows, inputs of qkv], what enters the attention of a layer without a norm, or NULL */
    const float *cos, *sin; /* [rows, width] */
    const void* masks[2]; /* [rows, length + rows], of the model's dtype: a key is seen where it is 0; NULL: all are */
    int64_t mask_strides[2]; /* elements from one row to the next */
    void *keys, *values;     /* [layers, groups, capacity, width]; new ones are written from `length` on */
    int64_t layer_stride, head_stride;
    void* kept[4];    /* [rows, hidden] each */
    void *out, *last; /* [rows, hidden] before and after the last norm; or NULL */
    float* work;      /* of `workspace` floats */
    int32_t rows, length, threads;
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

/* Norm of rows [rows, count] of the dtype that is_bf16 says; work holds 2 * count floats. */
void norm_rows(const void* x, const float* weight, int32_t rows, int32_t count, float eps, int32_t is_bf16, void* out,
               float* work) {
    for (int r = 0; r < rows; r++) {
        read_row(x, (int64_t)r * count, count, is_bf16, work);
        normalise(work, weight, count, eps, work + count);
        write_row(out, (int64_t)r * count, count, is_bf16, work + count);
    }
}

static void rotate(float* head, const float* cos, const float* sin, int width, float factor) {
    int half = width / 2;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = (a * cos[i] - b * sin[i]) * factor;
        head[i + half] = (b * cos[i + half] + a * sin[i + half]) * factor;
    }
}

/* Transpose LANES x LANES values in registers: neighbours change places, then neighbouring pairs, and so on. */
INLINE void transpose(vec* rows) {
#pragma GCC unroll 4
    for (int size = 1; size < LANES; size *= 2) {
        ints low, high;
        for (int lane = 0; lane < LANES; lane++) {
            low[lane] = lane & size ? LANES + lane - size : lane;
            high[lane] = lane & size ? LANES + lane : lane + size;
        }
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++) {
            if (row & size) continue;
            vec a = rows[row], b = rows[row + size];
            rows[row] = __builtin_shuffle(a, b, low);
            rows[row + size] = __builtin_shuffle(a, b, high);
        }
    }
}

/* Scores of some queries [width] with LANES keys, those turned to [width][LANES]. */
INLINE void score(const int count, const float* const* queries, const float* keys, int width, float* const* scores) {
    vec sums[8];
#pragma GCC unroll 8
    for (int q = 0; q < count; q++) sums[q] = (vec){0};
    for (int d = 0; d < width; d++) {
        vec key = *(const vec*)(keys + d * LANES);
#pragma GCC unroll 8
        for (int q = 0; q < count; q++) sums[q] += queries[q][d] * key;
    }
#pragma GCC unroll 8
    for (int q = 0; q < count; q++) put(scores[q], sums[q]);
}

/* Floats of a thread's own, a multiple of what vectors are aligned to. */
INLINE int64_t own_floats(const Model* model, int32_t rows) {
    int64_t inputs = model->layers->qkv.inputs > model->hidden ? model->layers->qkv.inputs : model->hidden;
    return (rows * inputs + model->width * LANES + LANES - 1) / LANES * LANES;
}

/* Floats that `step` works with. */
int64_t workspace(const Model* model, int32_t rows, int32_t length, int32_t threads) {
    int64_t keys = (length + rows + LANES - 1) / LANES * LANES, wide = model->heads + 2 * model->groups;
    int64_t widest = model->hidden > model->width * model->heads ? model->hidden : model->width * model->heads;
    return rows * (widest * 3 + wide * model->width + 2 * (int64_t)model->inner + model->heads * keys + 2 * keys + 8) +
           threads * own_floats(model, rows) + 64;
}

/* Where threads wait for each other. Those of OpenMP go to sleep after a while, and where another program is running on
 * the same cores, waking up two hundred times a step takes ten times as long as the step. */
typedef struct {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int round;
    int threads;
} Meeting;

static void wait_for_all(Meeting* meeting) {
    int round = atomic_load_explicit(&meeting->round, memory_order_acquire);
    if (atomic_fetch_add_explicit(&meeting->arrived, 1, memory_order_acq_rel) + 1 == meeting->threads) {
        atomic_store_explicit(&meeting->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&meeting->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&meeting->round, memory_order_acquire) == round; spins++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
        if (spins > SPINS) sched_yield(); /* more threads than cores */
    }
}

typedef struct {
    Meeting* meeting;
    float *x, *qkv, *mixed, *gate, *up, *scores, *after; /* shared: [rows, ...]; scores [rows * heads, padded keys] */
    int32_t *seen[2], *num_seen[2];                      /* [rows, keys], [rows] by mask */
    float *normed, *turned;                              /* a thread's own */
    int64_t padded;
} Work;

static void find_seen(const Model* model, const Call* call, Work* work, int mask, int r) {
    int total_keys = call->length + call->rows, found = 0;
    int32_t* list = work->seen[mask] + (int64_t)r * work->padded;
    int64_t base = call->mask_strides[mask] * r;
    for (int k = 0; k < total_keys; k++) {
        int visible = !call->masks[mask] || (model->is_bf16 ? ((const uint16_t*)call->masks[mask])[base + k] == 0
                                                            : ((const float*)call->masks[mask])[base + k] == 0.0f);
        if (visible) list[found++] = k;
    }
    work->num_seen[mask][r] = found;
}

/* Turn queries and new keys of one row's head, and write keys and values into the cache. */
static void enter_cache(const Model* model, const Layer* layer, const Call* call, int64_t cache, float* qkv, int r,
                        int head) {
    int width = model->width, kind = head < model->heads ? 0 : head < model->heads + model->groups ? 1 : 2;
    float* values = qkv + (int64_t)r * (model->heads + 2 * model->groups) * width + (int64_t)head * width;
    int group = (head - model->heads) % model->groups;
    int64_t place = cache + group * call->head_stride + (int64_t)(call->length + r) * width;
    if (kind == 2) {
        write_row(call->values, place, width, model->is_bf16, values);
        return;
    }
    const float* norm = kind ? layer->key_norm : layer->query_norm;
    if (norm) normalise(values, norm, width, model->eps, values);
    rotate(values, call->cos + (int64_t)r * width, call->sin + (int64_t)r * width, width, kind ? 1.0f : model->scaling);
    if (kind) write_row(call->keys, place, width, model->is_bf16, values);
}

/* Scores of all rows' heads of a group with LANES keys from `first` on. */
static void score_block(const Model* model, const Call* call, int64_t cache, Work* work, int group, int first) {
    int width = model->width, each = model->heads / model->groups, queries = call->rows * each;
    int total_keys = call->length + call->rows, wide = (model->heads + 2 * model->groups) * width;
    int64_t base = cache + group * call->head_stride;
    for (int d = 0; d < width; d += LANES) {
        vec block[LANES];
#pragma GCC unroll 16
        for (int k = 0; k < LANES; k++) {
            int key = first + k < total_keys ? first + k : total_keys - 1;
            block[k] = load(call->keys, base + (int64_t)key * width + d, model->is_bf16);
        }
        transpose(block);
#pragma GCC unroll 16
        for (int k = 0; k < LANES; k++) *(vec*)(work->turned + (d + k) * LANES) = block[k];
    }
    for (int q = 0; q < queries; q += 8) {
        const float* these[8];
        float* scores[8];
        int count = queries - q < 8 ? queries - q : 8;
        for (int i = 0; i < count; i++) {
            int r = (q + i) / each, head = group * each + (q + i) % each;
            these[i] = work->qkv + (int64_t)r * wide + head * width;
            scores[i] = work->scores + ((int64_t)r * model->heads + head) * work->padded + first;
        }
#define CASE_SCORE(N)                                 \
    case N:                                           \
        score(N, these, work->turned, width, scores); \
        break;
        switch (count) {
            CASE_SCORE(1)
            CASE_SCORE(2)
            CASE_SCORE(3)
            CASE_SCORE(4)
            CASE_SCORE(5)
            CASE_SCORE(6)
            CASE_SCORE(7)
            CASE_SCORE(8)
        }
    }
}

/* Softmax over the keys that a row sees, and the mean of their values by it, for one head. */
static void mix_values(const Model* model, const Layer* layer, const Call* call, int64_t cache, Work* work, int r,
                       int head) {
    int width = model->width, count = work->num_seen[layer->mask][r];
    int64_t base = cache + (int64_t)(head / (model->heads / model->groups)) * call->head_stride;
    float* scores = work->scores + ((int64_t)r * model->heads + head) * work->padded;
    float* out = work->mixed + ((int64_t)r * model->heads + head) * width;
    const int32_t* seen = work->seen[layer->mask] + (int64_t)r * work->padded;
    float largest = -INFINITY;
    for (int j = 0; j < count; j++) {
        float value = scores[seen[j]]; /* in place: seen[j] >= j */
        scores[j] = value;
        largest = value > largest ? value : largest;
    }
    int padded = (count + LANES - 1) / LANES * LANES;
    for (int j = count; j < padded; j++) scores[j] = -INFINITY;
    vec sums = {0};
    for (int j = 0; j < padded; j += LANES) {
        vec part = exponential(get(scores + j) - largest);
        if (j + LANES > count)
            for (int lane = count - j; lane < LANES; lane++) part[lane] = 0;
        put(scores + j, part);
        sums += part;
    }
    float factor = 1.0f / total(sums);
    for (int d = 0; d < width; d += 4 * LANES) {
        int vectors = (width - d) / LANES < 4 ? (width - d) / LANES : 4;
        vec found[4] = {{0}};
        if (vectors == 4) {
            vec a = {0}, b = {0}, c = {0}, e = {0};
            for (int j = 0; j < count; j++) {
                int64_t place = base + (int64_t)seen[j] * width + d;
                float share = scores[j];
                a += share * load(call->values, place, model->is_bf16);
                b += share * load(call->values, place + LANES, model->is_bf16);
                c += share * load(call->values, place + 2 * LANES, model->is_bf16);
                e += share * load(call->values, place + 3 * LANES, model->is_bf16);
            }
            found[0] = a, found[1] = b, found[2] = c, found[3] = e;
        } else {
            for (int j = 0; j < count; j++)
                for (int v = 0; v < vectors; v++)
                    found[v] +=
                        scores[j] * load(call->values, base + (int64_t)seen[j] * width + d + v * LANES, model->is_bf16);
        }
        for (int v = 0; v < vectors; v++) put(out + d + v * LANES, (found[v] * factor));
    }
}

static void add_share(const Weight* weight, const Model* model, const float* input, int rows, int thread, int threads,
                      float* scratch, float* x) {
    Share share = share_of(weight->outputs, thread, threads);
    product_share(weight, input, weight->inputs, rows, share, scratch, model->hidden);
    for (int r = 0; r < rows; r++)
        for (int o = share.begin * STREAM; o < end_of(share, weight->outputs); o++)
            x[(int64_t)r * model->hidden + o] += scratch[(int64_t)r * model->hidden + o];
}

static void run_layer(const Model* model, const Layer* layer, const Call* call, int index, Work* work, int thread,
                      int threads) {
    int rows = call->rows, hidden = model->hidden, heads = model->heads, groups = model->groups;
    int wide = (heads + 2 * groups) * model->width, total_keys = call->length + rows;
    int64_t cache = index * call->layer_stride;
    if (layer->keep >= 0)
        for (int r = thread; r < rows; r += threads)
            write_row(call->kept[layer->keep], (int64_t)r * hidden, hidden, model->is_bf16,
                      work->x + (int64_t)r * hidden);
    int inputs = layer->qkv.inputs;
    for (int r = 0; r < rows; r++)
        if (layer->norm)
            normalise(work->x + (int64_t)r * hidden, layer->norm, hidden, model->eps,
                      work->normed + (int64_t)r * inputs);
        else
            read_row(call->entered, (int64_t)r * inputs, inputs, model->is_bf16, work->normed + (int64_t)r * inputs);
    product_share(&layer->qkv, work->normed, inputs, rows, share_of(wide, thread, threads), work->qkv, wide);
    wait_for_all(work->meeting);
    int items = rows * (heads + 2 * groups);
    for (int item = items * thread / threads; item < items * (thread + 1) / threads; item++)
        enter_cache(model, layer, call, cache, work->qkv, item % rows, item / rows);
    wait_for_all(work->meeting);
    int blocks = (total_keys + LANES - 1) / LANES, all = groups * blocks;
    for (int item = (int)((int64_t)all * thread / threads); item < (int)((int64_t)all * (thread + 1) / threads); item++)
        score_block(model, call, cache, work, item / blocks, item % blocks * LANES);
    wait_for_all(work->meeting);
    items = rows * heads;
    for (int item = items * thread / threads; item < items * (thread + 1) / threads; item++)
        mix_values(model, layer, call, cache, work, item % rows, item / rows);
    wait_for_all(work->meeting);
    add_share(&layer->out, model, work->mixed, rows, thread, threads, work->after, work->x);
    wait_for_all(work->meeting);
    for (int r = 0; r < rows; r++)
        normalise(work->x + (int64_t)r * hidden, layer->mlp_norm, hidden, model->eps,
                  work->normed + (int64_t)r * hidden);
    Share share = share_of(model->inner, thread, threads);
    product_share(&layer->gate, work->normed, hidden, rows, share, work->gate, model->inner);
    product_share(&layer->up, work->normed, hidden, rows, share, work->up, model->inner);
    int from = share.begin * STREAM, to = end_of(share, model->inner);
    for (int r = 0; r < rows && to > from; r++) {
        float *gate = work->gate + (int64_t)r * model->inner, *up = work->up + (int64_t)r * model->inner;
        activate(gate + from, to - from);
        for (int i = from; i < to; i++) gate[i] *= up[i];
    }
    wait_for_all(work->meeting);
    add_share(&layer->down, model, work->gate, rows, thread, threads, work->after, work->x);
    wait_for_all(work->meeting);
}

/* Run all layers and the last norm over a root and its tree. Nothing is committed: keys are written behind `length`. */
void step(const Model* model, const Call* call) {
    int rows = call->rows, hidden = model->hidden;
    int64_t padded = (call->length + rows + LANES - 1) / LANES * LANES;
    int64_t wide = (int64_t)(model->heads + 2 * model->groups) * model->width;
    int64_t mixed = (int64_t)model->heads * model->width;
    float* free = (float*)(((uintptr_t)call->work + 63) / 64 * 64);
    Meeting meeting = {0};
    Work shared = {.meeting = &meeting, .padded = padded};
    shared.x = free, free += rows * (int64_t)hidden;
    shared.after = free, free += rows * (int64_t)hidden;
    shared.mixed = free, free += rows * mixed;
    shared.qkv = free, free += rows * wide;
    shared.gate = free, free += rows * (int64_t)model->inner;
    shared.up = free, free += rows * (int64_t)model->inner;
    shared.scores = free, free += rows * (int64_t)model->heads * padded;
    for (int mask = 0; mask < 2; mask++) {
        shared.seen[mask] = (int32_t*)free, free += rows * padded;
        shared.num_seen[mask] = (int32_t*)free, free += rows;
    }
    free = (float*)(((uintptr_t)free + 63) / 64 * 64);
#pragma omp parallel num_threads(call->threads)
    {
#ifdef _OPENMP
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
        int thread = 0, threads = 1;
#endif
#pragma omp single
        meeting.threads = threads; /* fewer than asked for, perhaps */
        Work work = shared;
        work.turned = free + thread * own_floats(model, rows);
        work.normed = work.turned + model->width * LANES;
        for (int r = thread; r < rows; r += threads) {
            read_row(call->embedded, (int64_t)r * hidden, hidden, model->is_bf16, work.x + (int64_t)r * hidden);
            for (int mask = 0; mask < model->num_masks; mask++) find_seen(model, call, &work, mask, r);
        }
#pragma omp barrier
        for (int index = 0; index < model->num_layers; index++)
            run_layer(model, model->layers + index, call, index, &work, thread, threads);
        for (int r = thread; r < rows; r += threads) {
            if (call->out)
                write_row(call->out, (int64_t)r * hidden, hidden, model->is_bf16, work.x + (int64_t)r * hidden);
            if (!model->last_norm) continue;
            normalise(work.x + (int64_t)r * hidden, model->last_norm, hidden, model->eps, work.normed);
            write_row(call->last, (int64_t)r * hidden, hidden, model->is_bf16, work.normed);
        }
    }
}
