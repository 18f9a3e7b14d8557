/* The decode step of a small language model on a CPU: matrix products of few rows, and whole decoder layers.
 *
 * A step reads every weight once, so it can take no longer than memory does, if the products keep up: a weight is
 * loaded once and multiplied with all rows while it is in a register. Weights are laid out in streams of outputs, two
 * of which are read side by side. All layers run in one parallel region; between them threads wait for each
 * other, and nothing else happens. The rows of a call may be of several sequences, each with keys of its own.
 *
 * Every row is computed by the same operations in the same order, however many rows there are beside it and wherever
 * its keys lie in the cache. So a token verified within a tree has the logits, bit by bit, that it has when it is
 * decoded alone.
 *
 * Plain C with GCC's vector extensions: compiled for the machine it runs on, with any width of registers.
 */

#include "attention.h"
#include "coupling.h"
#include "largest.h"

/* Norm of rows [rows, count] of the dtype that is_bf16 says; work holds 2 * count floats. */
void norm_rows(const void* x, const float* weight, int32_t rows, int32_t count, float eps, int32_t is_bf16, void* out,
               float* work) {
    for (int r = 0; r < rows; r++) {
        read_row(x, (int64_t)r * count, count, is_bf16, work);
        normalise(work, weight, count, eps, work + count);
        write_row(out, (int64_t)r * count, count, is_bf16, work + count);
    }
}

/* Floats of a thread's own, a multiple of what vectors are aligned to. */
INLINE int64_t own_floats(const Model* model, int32_t rows) {
    int64_t inputs = model->layers->qkv.inputs > model->hidden ? model->layers->qkv.inputs : model->hidden;
    return (rows * inputs + model->width * BLOCK + LANES - 1) / LANES * LANES;
}

/* Places for the scores of a query: keys of the longest sequence, in whole blocks. */
INLINE int64_t padded_keys(const Call* call) {
    int64_t most = 0;
    for (int i = 0; i < call->num_sequences; i++) {
        int64_t keys = call->sequences[i].length + call->sequences[i].count;
        most = keys > most ? keys : most;
    }
    return (most + BLOCK - 1) / BLOCK * BLOCK;
}

/* Floats that `step` works with. */
int64_t workspace(const Model* model, const Call* call) {
    int64_t keys = padded_keys(call), wide = model->heads + 2 * model->groups, mixed = model->width * model->heads;
    int64_t each = 2 * (int64_t)model->hidden + mixed + wide * model->width + 2 * (int64_t)model->inner +
                   model->heads * (keys + 1) + 2 * (keys + 2) + 2;
    return call->rows * each + call->threads * own_floats(model, call->rows) + 128;
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
    int wide = (heads + 2 * groups) * model->width;
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
    for (int i = items * thread / threads; i < items * (thread + 1) / threads; i++)
        enter_cache(model, layer, call, cache, work, i % rows, i / rows);
    wait_for_all(work->meeting);
    score_share(model, call, cache, work, thread, threads);
    wait_for_all(work->meeting);
    mix_share(model, layer, call, cache, work, thread, threads);
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
    int64_t padded = padded_keys(call);
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
    shared.factors = free, free += rows * (int64_t)model->heads;
    for (int mask = 0; mask < 2; mask++) {
        shared.seen[mask] = (int32_t*)free, free += rows * padded;
        shared.num_seen[mask] = (int32_t*)free, free += rows;
        shared.first_gap[mask] = (int32_t*)free, free += rows;
    }
    free = (float*)(((uintptr_t)free + 63) / 64 * 64);
    shared.owners = (const Sequence**)free, free += 2 * (int64_t)rows;
    free = (float*)(((uintptr_t)free + 63) / 64 * 64);
    for (int i = 0; i < call->num_sequences; i++)
        for (int64_t r = 0; r < call->sequences[i].count; r++)
            shared.owners[call->sequences[i].first + r] = call->sequences + i;
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
        work.normed = work.turned + model->width * BLOCK;
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
