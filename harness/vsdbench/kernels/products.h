/* Products of few rows with a weight that was laid out for them. */
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

#define CHUNK 48   /* inputs multiplied before the next rows: that part of a panel stays in the first cache */
#define AHEAD 1536 /* bytes that weights are asked for in advance: hardware stops at the end of a page */
#define TILE 24    /* rows multiplied before the next ones: their sums and that part of them stay there, too */

/* A weight [outputs, inputs], laid out by `lay_out`; bias is float32 or NULL. */
typedef struct {
    const void* panels;
    const float* bias;
    int32_t outputs, inputs, is_bf16;
} Weight;

int32_t panel_width(void) { return PANEL; }

/* Lay out [outputs, inputs] as streams [inputs][STREAM], the last panel filled with zeros. In bfloat16 the two vectors
 * of a stream share words: the first has the lower halves, the second the upper. */
void lay_out(const void* weight, void* panels, int32_t outputs, int32_t inputs, int32_t is_bf16) {
    int count = (outputs + PANEL - 1) / PANEL * (PANEL / STREAM);
#pragma omp parallel for
    for (int stream = 0; stream < count; stream++)
        for (int i = 0; i < inputs; i++) {
            int64_t base = ((int64_t)stream * inputs + i) * STREAM;
            for (int lane = 0; lane < STREAM; lane++) {
                int64_t output = (int64_t)stream * STREAM + lane;
                if (is_bf16)
                    ((uint16_t*)panels)[base + 2 * (lane % LANES) + lane / LANES] =
                        output < outputs ? ((const uint16_t*)weight)[output * inputs + i] : 0;
                else
                    ((float*)panels)[base + lane] = output < outputs ? ((const float*)weight)[output * inputs + i] : 0;
            }
        }
}

/* Add to tile [rows][PANEL] the product of `count` inputs of some rows with the streams of a panel, one or two. They
 * lie `apart` bytes from each other: memory is read in two places at once, which is faster than in one. */
INLINE void multiply(const int rows, const int streams, const int is_bf16, const char* weights, int64_t apart,
                     const float* x, int64_t stride, int count, float* tile, int64_t ahead) {
    const int64_t step = STREAM * (is_bf16 ? 2 : 4);
    vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * streams; v++) sums[r][v] = get(tile + r * PANEL + v * LANES);
    for (int i = 0; i < count; i++, weights += step) {
        vec w[VECTORS];
#pragma GCC unroll 2
        for (int s = 0; s < streams; s++) {
            if (is_bf16) {
                bits both = (bits)(*(const loose_bits*)(weights + s * apart));
                w[2 * s] = (vec)(both << 16);
                w[2 * s + 1] = (vec)(both & 0xffff0000u);
            } else {
                w[2 * s] = get((const float*)(weights + s * apart));
                w[2 * s + 1] = get((const float*)(weights + s * apart + 4 * LANES));
            }
            __builtin_prefetch(weights + s * apart + ahead, 0, 3);
            if (!is_bf16) __builtin_prefetch(weights + s * apart + ahead + 64, 0, 3);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < 2 * streams; v++) sums[r][v] += x[r * stride + i] * w[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * streams; v++) put(tile + r * PANEL + v * LANES, sums[r][v]);
}

#define CASE(R)                                                               \
    case R:                                                                   \
        if (is_bf16 && streams == 2)                                          \
            multiply(R, 2, 1, weights, apart, x, stride, count, tile, ahead); \
        else if (is_bf16)                                                     \
            multiply(R, 1, 1, weights, apart, x, stride, count, tile, ahead); \
        else if (streams == 2)                                                \
            multiply(R, 2, 0, weights, apart, x, stride, count, tile, ahead); \
        else                                                                  \
            multiply(R, 1, 0, weights, apart, x, stride, count, tile, ahead); \
        break;

static void multiply_any(int rows, int streams, int is_bf16, const char* weights, int64_t apart, const float* x,
                         int64_t stride, int count, float* tile, int64_t ahead) {
    switch (rows) {
        CASE(1)
        CASE(2)
        CASE(3)
#if ROWS > 3
        CASE(4)
        CASE(5)
        CASE(6)
#endif
    }
}

/* The share of a product that one thread takes: streams [begin, end). */
typedef struct {
    int begin, end;
} Share;

INLINE Share share_of(int outputs, int thread, int threads) {
    int streams = (outputs + STREAM - 1) / STREAM;
    Share share = {streams * thread / threads, streams * (thread + 1) / threads};
    return share;
}

/* Write x [rows, inputs], TILE rows at most, times one or two streams from the s-th on, and their bias. */
static void product_panel(const Weight* weight, const float* x, int64_t stride, int rows, int s, int streams,
                          float* out, int64_t out_stride) {
    float tile[TILE * PANEL] __attribute__((aligned(64)));
    const int passes = (rows + ROWS - 1) / ROWS, step = passes > 1 ? CHUNK : weight->inputs;
    const int is_bf16 = weight->is_bf16, bytes = STREAM * (is_bf16 ? 2 : 4);
    const int64_t apart = (int64_t)weight->inputs * bytes;
    for (int r = 0; r < rows; r++) memset(tile + r * PANEL, 0, 4 * (size_t)(streams * STREAM));
    for (int i = 0; i < weight->inputs; i += step) {
        int count = weight->inputs - i < step ? weight->inputs - i : step;
        const char* weights = (const char*)weight->panels + s * apart + (int64_t)i * bytes;
        for (int pass = 0; pass < passes; pass++) {
            int r = rows * pass / passes, next = rows * (pass + 1) / passes;
            multiply_any(next - r, streams, is_bf16, weights, apart, x + r * stride + i, stride, count,
                         tile + r * PANEL, pass == 0 ? AHEAD : (int64_t)step * bytes);
        }
    }
    int from = s * STREAM,
        count = weight->outputs - from < streams * STREAM ? weight->outputs - from : streams * STREAM;
    for (int r = 0; r < rows; r++) {
        float* row = out + r * out_stride + from;
        const float* sums = tile + r * PANEL;
        if (weight->bias)
            for (int o = 0; o < count; o++) row[o] = sums[o] + weight->bias[from + o];
        else
            memcpy(row, sums, 4 * (size_t)count);
    }
}

/* Write the share of x [rows, inputs] times a weight, and its bias, into out [rows, outputs]. */
static void product_share(const Weight* weight, const float* x, int64_t stride, int rows, Share share, float* out,
                          int64_t out_stride) {
    for (int s = share.begin; s < share.end; s += 2)
        for (int r = 0; r < rows; r += TILE)
            product_panel(weight, x + r * stride, stride, rows - r < TILE ? rows - r : TILE, s,
                          s + 1 < share.end ? 2 : 1, out + r * out_stride, out_stride);
}

INLINE int end_of(Share share, int outputs) { return share.end * STREAM < outputs ? share.end * STREAM : outputs; }

INLINE void activate(float* row, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) put(row + i, silu(get(row + i)));
    if (i < count) {
        float rest[LANES] = {0};
        memcpy(rest, row + i, 4 * (size_t)(count - i));
        vec done = silu(get(rest));
        memcpy(row + i, &done, 4 * (size_t)(count - i));
    }
}

/* out [rows, outputs] = x [rows, inputs] times a weight, then SiLU (activation 1), then plus (1) or times (2) other.
 * work holds rows * (inputs + outputs) floats; x, other and out are bfloat16 or float32. */
void product(const Weight* weight, const void* x, int32_t rows, int32_t is_bf16, int32_t activation, int32_t operation,
             const void* other, void* out, float* work, int32_t threads) {
    int inputs = weight->inputs, outputs = weight->outputs;
    float* results = work + (int64_t)rows * inputs;
    const float* read = (const float*)x;
    if (is_bf16) {
        for (int r = 0; r < rows; r++) read_row(x, (int64_t)r * inputs, inputs, 1, work + (int64_t)r * inputs);
        read = work;
    } else {
        results = (float*)out;
    }
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        int thread = omp_get_thread_num(), count = omp_get_num_threads();
#else
        int thread = 0, count = 1;
#endif
        Share share = share_of(outputs, thread, count);
        product_share(weight, read, inputs, rows, share, results, outputs);
        int from = share.begin * STREAM, to = end_of(share, outputs);
        for (int r = 0; r < rows; r++) {
            float* row = results + (int64_t)r * outputs;
            int64_t base = (int64_t)r * outputs;
            if (activation && to > from) activate(row + from, to - from);
            if (operation)
                for (int o = from; o < to; o++) {
                    float value =
                        is_bf16 ? to_float(((const uint16_t*)other)[base + o]) : ((const float*)other)[base + o];
                    row[o] = operation == 1 ? row[o] + value : row[o] * value;
                }
            if (is_bf16 && to > from) write_row(out, base + from, to - from, 1, row + from);
        }
    }
}
