/* Linear layers of training in bf16, forward and backward: weights are read as they are (fp32 or bf16), their
   gradients are fp32. The plain twin is F.linear (nn/linear.py). Called by nn/multiply.py; a processor that does not
   multiply bf16 by itself has none of this. */

#include "vectors.h"

#if defined(__AVX512BF16__) && defined(WIDE)
#include "multiply.h"

#define STRIPE 320 /* columns of a weight's gradient, either way, that one thread computes: they stay in its cache */

typedef struct { /* matrices under each other; fp32, or all of them bf16 */
    char *at[4];
    int64_t rows[4], wide;
} Stack;

static char **rows_of(Stack w, int64_t out, int64_t bytes) {
    char **row = malloc(out * sizeof(char *));
    for (int64_t i = 0, o = 0; i < 4; i++)
        for (int64_t r = 0; r < w.rows[i]; r++) row[o++] = w.at[i] + r * bytes;
    return row;
}

INLINE int64_t bands(int64_t N, int threads) { return parts(N, least(BAND, up(parts(N, threads), TALL))); }
static float *room_for_sums(int64_t depth, int64_t out) {
    return depth > DEPTH ? aligned_alloc(64, (BAND + 2 * TALL) * up(out, WIDTH) * 4) : 0;
}

/* Band i of `count` of y [N, out] = a b */
static void some_rows(const bf16 *a, int64_t lda, int64_t N, int64_t depth, const char *panels, int64_t out, bf16 *y,
                      int64_t i, int64_t count, float *sums) {
    const int64_t to = begin(N, TALL, i + 1, count), from = least(begin(N, TALL, i, count), to - TALL);
    if (begin(N, TALL, i, count) < to)
        band((const char *)(a + from * lda), 2 * lda, to - from, depth, panels, out, y + from * out, out, sums);
}

/* y [N, out] = x wᵀ, N >= 8; `in` is even */
void shoestring_linear_forward(const bf16 *x, int64_t ldx, int64_t N, int64_t in, const Stack *w, int64_t out, bf16 *y,
                               int threads) {
    char **row = rows_of(*w, out, in * (w->wide ? 4 : 2));
    const Rows weight = {(const char *const *)row, out, in, w->wide};
    const int64_t size = panel_size(in), count = bands(N, threads);
    char *panels = aligned_alloc(64, up(out, WIDTH) / WIDTH * size);
#pragma omp parallel num_threads(threads)
    {
        float *sums = room_for_sums(in, out);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < out; at += WIDTH) pack_across(weight, at, panels + at / WIDTH * size);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) some_rows(x, ldx, N, in, panels, out, y, i, count, sums);
        free(sums);
    }
    free(panels);
    free(row);
}

/* dx [N, in] = dy w; `out` is even */
void shoestring_linear_inputs(const bf16 *dy, int64_t lddy, int64_t N, int64_t in, const Stack *w, int64_t out,
                              bf16 *dx, int threads) {
    char **row = rows_of(*w, out, in * (w->wide ? 4 : 2));
    const Rows weight = {(const char *const *)row, out, in, w->wide};
    const int64_t size = panel_size(out), count = bands(N, threads);
    char *panels = aligned_alloc(64, up(in, WIDTH) / WIDTH * size);
#pragma omp parallel num_threads(threads)
    {
        float *sums = room_for_sums(out, in);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < in; at += WIDTH)
            pack_down(weight, 0, out, at, at + WIDTH, panels + at / WIDTH * size);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) some_rows(dy, lddy, N, out, panels, in, dx, i, count, sums);
        free(sums);
    }
    free(panels);
    free(row);
}

static char *gradient_room(void) { return aligned_alloc(64, (DEPTH / 2 + 4) * 2 * (STRIPE + 2 * WIDTH) * 4); }

/* fp32 dw = dyᵀ x, written to, or with `add` added to, the matrices of the stack */
void shoestring_linear_weights(const bf16 *dy, int64_t lddy, const bf16 *x, int64_t ldx, int64_t N, int64_t in,
                               const Stack *dw, int64_t out, int64_t add, int threads) {
    float *const *made = (float *const *)rows_of(*dw, out, in * 4);
    const int64_t across = parts(in, STRIPE);
    int64_t down = parts(out, STRIPE);
    while (down * across % threads && (down + 1) * 2 * TALL < out) down++;
    const char **rows = malloc(2 * N * sizeof(char *));
    for (int64_t n = 0; n < N; n++) rows[n] = (const char *)(dy + n * lddy), rows[N + n] = (const char *)(x + n * ldx);
    const Rows left = {rows, N, out, 0}, right = {rows + N, N, in, 0};
#pragma omp parallel num_threads(threads)
    {
        char *work = gradient_room();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < down * across; i++)
            gradient(left, right, begin(out, TALL, i / across, down), begin(out, TALL, i / across + 1, down),
                     begin(in, WIDTH, i % across, across), begin(in, WIDTH, i % across + 1, across), add, made, work);
        free(work);
    }
    free(rows);
    free((void *)made);
}

#include "experts.h"

int64_t shoestring_multiplies(void) { return 1; }
#else
int64_t shoestring_multiplies(void) { return 0; }
#endif
