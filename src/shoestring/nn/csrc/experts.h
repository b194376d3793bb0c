/* Routed experts, forward and backward: an expert's three products and SwiGLU on some rows at a time, which stay in
   the second cache from their gathering to their output; nn/experts.py's _Loop says what is computed.

   `token` [P] of each row, the rows of expert e ending at ends[e] and being a multiple of 8; weights [E, *, *] are
   fp32 or bf16, gradients fp32. A task is an expert's rows or a part of them, so that there are enough for all threads;
   who computes it changes no bit. */

void shoestring_swiglu_forward_bf16(const bf16 *, int64_t, int64_t, bf16 *, int);
void shoestring_swiglu_backward_bf16(const bf16 *, const bf16 *, const float *, int64_t, int64_t, bf16 *, bf16 *,
                                     float *, int);

typedef struct {
    const bf16 *x;         /* [N, D] */
    const int64_t *token, *ends;
    const char *gate_up, *down; /* [E, 2F, D], [E, D, F] */
    int64_t E, D, F, wide;
    bf16 *h, *y;           /* [P, 2F], [P, D]: gate and up, the output */
    const bf16 *dy;        /* [N, D], the rest is for the backward */
    const float *weight;   /* [P] */
    bf16 *dh, *a, *dx;     /* [P, 2F]; [P, F] times the weight; [P, D] */
    float *dweight, *dgate_up, *ddown;
} Experts;

/* The rows of expert e as a matrix [rows, columns] from number `at` on */
static void matrix(const char *at, int64_t rows, int64_t columns, int64_t wide, const char **row, Rows *made) {
    for (int64_t r = 0; r < rows; r++) row[r] = at + r * columns * (wide ? 4 : 2);
    *made = (Rows){row, rows, columns, wide};
}

static void gathered(const bf16 *x, const int64_t *token, int64_t rows, int64_t D, bf16 *to) {
    for (int64_t r = 0; r < rows; r++) memcpy(to + r * D, x + token[r] * D, D * sizeof(bf16));
}

static void expert_forward(const Experts *g, int64_t e, int64_t from, int64_t to, char *work) {
    const int64_t D = g->D, F = g->F, bytes = g->wide ? 4 : 2;
    const char **row = (const char **)work;
    char *up_panels = work + up((2 * F > D ? 2 * F : D) * 8, 64);
    char *down_panels = up_panels + up(2 * F, WIDTH) / WIDTH * panel_size(D);
    bf16 *some = (bf16 *)(down_panels + up(D, WIDTH) / WIDTH * panel_size(F)), *a = some + (BAND + TALL) * D;
    float *sums = (float *)(a + (BAND + TALL) * up(F, 32));
    Rows w;
    matrix(g->gate_up + e * 2 * F * D * bytes, 2 * F, D, g->wide, row, &w);
    for (int64_t at = 0; at < 2 * F; at += WIDTH) pack_across(w, at, up_panels + at / WIDTH * panel_size(D));
    matrix(g->down + e * D * F * bytes, D, F, g->wide, row, &w);
    for (int64_t at = 0; at < D; at += WIDTH) pack_across(w, at, down_panels + at / WIDTH * panel_size(F));
    for (int64_t at = from; at < to; at += BAND) {
        const int64_t rows = least(BAND, to - at);
        gathered(g->x, g->token + at, rows, D, some);
        band((char *)some, 2 * D, rows, D, up_panels, 2 * F, g->h + at * 2 * F, 2 * F, sums);
        shoestring_swiglu_forward_bf16(g->h + at * 2 * F, rows, F, a, 1);
        band((char *)a, 2 * F, rows, F, down_panels, D, g->y + at * D, D, sums);
    }
}

static void expert_backward(const Experts *g, int64_t e, int64_t from, int64_t to, char *work) {
    const int64_t D = g->D, F = g->F, bytes = g->wide ? 4 : 2;
    const char **row = (const char **)work;
    char *down_panels = work + up((2 * F > D ? 2 * F : D) * 8, 64);
    char *up_panels = down_panels + up(F, WIDTH) / WIDTH * panel_size(D);
    bf16 *some = (bf16 *)(up_panels + up(D, WIDTH) / WIDTH * panel_size(2 * F)), *da = some + (BAND + TALL) * D;
    float *sums = (float *)(da + (BAND + TALL) * up(F, 32));
    Rows w;
    matrix(g->down + e * D * F * bytes, D, F, g->wide, row, &w);
    pack_down(w, 0, D, 0, up(F, WIDTH), down_panels);
    matrix(g->gate_up + e * 2 * F * D * bytes, 2 * F, D, g->wide, row, &w);
    pack_down(w, 0, 2 * F, 0, up(D, WIDTH), up_panels);
    for (int64_t at = from; at < to; at += BAND) {
        const int64_t rows = least(BAND, to - at);
        gathered(g->dy, g->token + at, rows, D, some);
        band((char *)some, 2 * D, rows, D, down_panels, F, da, F, sums);
        shoestring_swiglu_backward_bf16(da, g->h + at * 2 * F, g->weight + at, rows, F, g->dh + at * 2 * F,
                                        g->a + at * F, g->dweight + at, 1);
        band((char *)(g->dh + at * 2 * F), 4 * F, rows, 2 * F, up_panels, D, g->dx + at * D, D, sums);
    }
}

/* Of stripe i of `count` of both of an expert's gradients */
static void expert_gradients(const Experts *g, int64_t e, int64_t i, int64_t count, const char **row, char *work) {
    const int64_t D = g->D, F = g->F, from = e ? g->ends[e - 1] : 0, rows = g->ends[e] - from;
    const int64_t *token = g->token + from;
    float **made = (float **)row + 2 * rows;
    for (int64_t gate = 0; gate < 2; gate++) {
        const int64_t out = gate ? 2 * F : D, in = gate ? D : F;
        float *dw = gate ? g->dgate_up + e * 2 * F * D : g->ddown + e * D * F;
        for (int64_t o = 0; o < out; o++) made[o] = dw + o * in;
        for (int64_t r = 0; r < rows; r++) {
            row[r] = (const char *)(gate ? g->dh + (from + r) * 2 * F : g->dy + token[r] * D);
            row[rows + r] = (const char *)(gate ? g->x + token[r] * D : g->a + (from + r) * F);
        }
        const Rows left = {row, rows, out, 0}, right = {row + rows, rows, in, 0};
        const int64_t top = begin(out, TALL, i, count), end = begin(out, TALL, i + 1, count);
        for (int64_t t = top; t < end; t += STRIPE)
            for (int64_t l = 0; l < in; l += STRIPE)
                gradient(left, right, t, least(end, t + STRIPE), l, least(in, l + STRIPE), 0, made, work);
    }
}

INLINE int64_t of_expert(const Experts *g, int64_t e, int64_t i, int64_t count) { /* where its part i begins */
    const int64_t from = e ? g->ends[e - 1] : 0;
    return from + begin(g->ends[e] - from, TALL, i, count);
}

static char *room(const Experts *g, int64_t depth) { /* for one task; `depth`: the longest sum */
    const int64_t D = g->D, F = g->F, wide = 2 * F > D ? 2 * F : D;
    return aligned_alloc(64, up(wide * 8 + 64 + (up(2 * F, WIDTH) + up(D, WIDTH)) * (depth + 2) * 4 +
                                    (BAND + TALL) * (D + up(F, 32)) * 2 + (BAND + 2 * TALL) * up(wide, WIDTH) * 4, 64));
}

void shoestring_experts_forward(const Experts *g, int threads) {
    const int64_t split = parts(4 * threads, g->E);
#pragma omp parallel num_threads(threads)
    {
        char *work = room(g, g->D > g->F ? g->D : g->F);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < g->E * split; i++) {
            const int64_t e = i / split, from = of_expert(g, e, i % split, split);
            const int64_t to = of_expert(g, e, i % split + 1, split);
            if (from < to) expert_forward(g, e, from, to, work);
        }
        free(work);
    }
}

void shoestring_experts_backward(const Experts *g, int threads) {
    const int64_t split = parts(4 * threads, g->E), D = g->D, F = g->F;
    int64_t most = 0;
    for (int64_t e = 0; e < g->E; e++) {
        const int64_t rows = g->ends[e] - (e ? g->ends[e - 1] : 0);
        most = rows > most ? rows : most;
    }
#pragma omp parallel num_threads(threads)
    {
        char *work = room(g, D > 2 * F ? D : 2 * F);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < g->E * split; i++) {
            const int64_t e = i / split, from = of_expert(g, e, i % split, split);
            const int64_t to = of_expert(g, e, i % split + 1, split);
            if (from < to) expert_backward(g, e, from, to, work);
        }
        free(work);
        if (g->dgate_up) {
            char *packed = gradient_room();
            const char **row = malloc((2 * most + (2 * F > D ? 2 * F : D)) * 8);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < g->E * split; i++) expert_gradients(g, i / split, i % split, split, row, packed);
            free(packed);
            free(row);
        }
    }
}
