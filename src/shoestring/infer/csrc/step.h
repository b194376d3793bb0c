/* The step for one dtype T: phases that the threads share, a barrier behind each. */

typedef struct {
    float *x, *wide, *y, *q; /* residual [R, D]; the normed row; the first products; q_b's */
    T *h, *c, *nope, *query, *o, *v,
        *a; /* normed row; normed query latent; q_nope; queries; attended; values; SwiGLU */
    float *logit, *score, *weight, *space;
    int64_t *chosen, *run; /* run: where rows begin that have one table, and R */
    int64_t runs, room;    /* room: numbers of a thread's `space` */
} NAME(Work);

INLINE char *NAME(take)(char **at, int64_t bytes) {
    char *here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

static int64_t NAME(first_width)(const Model *m) {
    return m->latent ? (m->q_lora ? m->q_lora : m->H * (m->nope + m->rope)) + m->C + m->rope : (m->H + 2 * m->G) * m->v;
}

static int64_t NAME(lay)(const Model *m, int64_t R, int64_t longest, int64_t threads, int64_t shared, char *base,
                         NAME(Work) * w) {
    const int64_t W = m->latent ? m->C + m->rope : m->v, V = m->latent ? m->C : m->v;
    const int64_t wide = m->A * m->F + shared, ld = (longest + 15) / 16 * 16 + 16, heads = m->H < ROWS ? m->H : ROWS;
    char *at = base;
    w->x = (float *)NAME(take)(&at, R * m->D * 4);
    w->wide = (float *)NAME(take)(&at, R * m->D * 4);
    w->y = (float *)NAME(take)(&at, R * NAME(first_width)(m) * 4);
    w->q = (float *)NAME(take)(&at, R * m->H * (m->nope + m->rope) * 4);
    w->h = (T *)NAME(take)(&at, R * m->D * sizeof(T));
    w->c = (T *)NAME(take)(&at, R * m->q_lora * sizeof(T));
    w->nope = (T *)NAME(take)(&at, R * m->H * m->nope * sizeof(T));
    w->query = (T *)NAME(take)(&at, R * m->H * W * sizeof(T));
    w->o = (T *)NAME(take)(&at, R * m->H * V * sizeof(T));
    w->v = (T *)NAME(take)(&at, R * m->H * m->v * sizeof(T));
    w->a = (T *)NAME(take)(&at, R * wide * sizeof(T));
    w->logit = (float *)NAME(take)(&at, R * m->E * 4);
    w->score = (float *)NAME(take)(&at, R * m->E * 4);
    w->weight = (float *)NAME(take)(&at, R * m->A * 4);
    w->chosen = (int64_t *)NAME(take)(&at, R * m->A * 8);
    w->run = (int64_t *)NAME(take)(&at, (R + 1) * 8);
    w->room = ROWS * (V + 15) / 16 * 16 + (SCORES > heads * ld ? SCORES : heads * ld);
    w->space = (float *)NAME(take)(&at, threads * w->room * 4);
    return at - base;
}

/* row r's keys and values into the cache, from the first products */
static void NAME(latent_entry)(const Model *m, const Layer *l, const Batch *b, const NAME(Work) * w, int64_t r) {
    const int64_t W = m->C + m->rope, at = b->length[r] - 1;
    const float *y = w->y + (r + 1) * NAME(first_width)(m) - W;
    T *entry = (T *)l->keys + ((int64_t)b->table[r * b->J + at / m->size] * m->size + at % m->size) * W;
    NAME(norm)(y, l->k_norm, l->k_eps, m->C, entry, 0);
    NAME(turn)(y + m->C, b->turn + at * m->rope, m->rope, m->interleaved, entry + m->C);
}

/* the queries in the order of the cache's entries, and this token's entry written */
static void NAME(latent_queries)(const Model *m, const Layer *l, const Batch *b, NAME(Work) * w, int t, int n) {
    const int64_t R = b->R, H = m->H, wide = m->nope, K = wide + m->rope, W = m->C + m->rope, Y = NAME(first_width)(m);
    for (int64_t r = low(R, 1, t, n); r < low(R, 1, t + 1, n); r++) {
        NAME(latent_entry)(m, l, b, w, r);
        if (m->q_lora) NAME(norm)(w->y + r * Y, l->q_norm, l->q_eps, m->q_lora, w->c + r * m->q_lora, 0);
    }
    const float *q = w->y;
    int64_t ld = Y;
    if (m->q_lora) {
#pragma omp barrier
        NAME(product)(t, n, w->c, m->q_lora, R, l->q_b, w->q, 0, 0, H * K);
        q = w->q, ld = H * K;
    }
#pragma omp barrier
    for (int64_t i = low(R * H, 1, t, n); i < low(R * H, 1, t + 1, n); i++) {
        const int64_t r = i / H, h = i % H;
        const float *from = q + r * ld + h * K, *cis = b->turn + (b->length[r] - 1) * m->rope;
        T *nope = w->nope + i * wide;
#pragma omp simd
        for (int64_t d = 0; d < wide; d++) nope[d] = ROUND(from[d]);
        NAME(turn)(from + m->nope, cis, m->rope, m->interleaved, w->query + i * W + m->C);
    }
#pragma omp barrier
    NAME(heads)(t, n, w->nope, H * m->nope, m->nope, R, H, l->uk, w->query, H * W, W);
}

/* heads from `first` on: H query heads, then those of the keys, which go into the cache with their values */
static void NAME(plain_heads)(const Model *m, const Layer *l, const Batch *b, NAME(Work) * w, int64_t first, int t,
                              int n) {
    const int64_t R = b->R, H = m->H, G = m->G, K = m->v, Y = NAME(first_width)(m), many = H + G - first;
    T head[K];
    float wide[K];
    for (int64_t i = low(R * many, 1, t, n); i < low(R * many, 1, t + 1, n); i++) {
        const int64_t r = i / many, h = first + i % many, at = b->length[r] - 1, g = h - H;
        const int64_t block = b->table[r * b->J + at / m->size], slot = ((block * G + g) * m->size + at % m->size) * K;
        const float *from = w->y + r * Y + h * K;
        const T *weight = h < H ? l->q_norm : l->k_norm;
        if (weight) NAME(norm)(from, weight, h < H ? l->q_eps : l->k_eps, K, head, wide), from = wide;
        NAME(turn)(from, b->turn + at * m->rope, m->rope, m->interleaved,
                   h < H ? w->query + (r * H + h) * K : (T *)l->keys + slot);
        if (h >= H)
            for (int64_t d = 0; d < K; d++) ((T *)l->values + slot)[d] = ROUND(w->y[r * Y + (H + G + g) * K + d]);
    }
}

/* silu(gate) · up of thread t's share of the columns, for rows of h, into a[i * lda] */
static void NAME(swiglu)(int t, int n, const T *const *h, int64_t R, Matrix gate, Matrix up, T *a, int64_t lda) {
    float g[ROWS * GROUP], u[ROWS * GROUP];
    const int64_t F = gate.out, end = low(F, OUTS, t + 1, n);
    for (int64_t at = low(F, OUTS, t, n); at < end; at += GROUP)
        for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
            const int64_t many = R - r0 < ROWS ? R - r0 : ROWS, outs = end - at < GROUP ? end - at : GROUP;
            NAME(multiply)(h + r0, many, gate, at, outs, g);
            NAME(multiply)(h + r0, many, up, at, outs, u);
            for (int64_t r = 0; r < many; r++) {
                float z[GROUP], *gr = g + r * GROUP, *ur = u + r * GROUP;
                if (gate.bias || up.bias)
                    for (int64_t o = 0; o < outs; o++) {
                        gr[o] += NAME(bias)(gate, at + o);
                        ur[o] += NAME(bias)(up, at + o);
                    }
#pragma omp simd
                for (int64_t o = 0; o < outs; o++) {
                    const float s = FLOAT(ROUND(gr[o]));
                    z[o] = s / (1.0f + exp1(-s)) * ur[o];
                }
                for (int64_t o = 0; o < outs; o++) a[(r0 + r) * lda + at + o] = ROUND(z[o]);
            }
        }
}

/* y[row[i]] += weight[i] · W a[i] for thread t's share of the columns; row null: i itself, weight null: 1 */
static void NAME(down)(int64_t from, int64_t to, const T *a, int64_t count, Matrix w, const int64_t *row,
                       const float *weight, float *y, int64_t D) {
    float out[ROWS * GROUP];
    const T *rows[ROWS];
    for (int64_t at = from; at < to; at += GROUP)
        for (int64_t i0 = 0; i0 < count; i0 += ROWS) {
            const int64_t many = count - i0 < ROWS ? count - i0 : ROWS, outs = to - at < GROUP ? to - at : GROUP;
            for (int64_t i = 0; i < many; i++) rows[i] = a + (i0 + i) * w.in;
            NAME(multiply)(rows, many, w, at, outs, out);
            for (int64_t i = 0; i < many; i++) {
                float *to_row = y + (row ? row[i0 + i] : i0 + i) * D + at;
                const float by = weight ? weight[i0 + i] : 1.0f;
                for (int64_t o = 0; o < outs; o++) to_row[o] += by * (out[i * GROUP + o] + NAME(bias)(w, at + o));
            }
        }
}

static void NAME(feed_forward)(const Model *m, const Layer *l, const Batch *b, NAME(Work) * w, int t, int n,
                               int64_t *chosen_out) {
    const int64_t R = b->R, D = m->D, E = l->gate.weight ? m->E : 0, A = m->A, F = m->F, S = l->gate_proj.out;
    int64_t begin[E + 1], row[E ? R * A : 1];
    float weight[E ? R * A : 1];
    const T *h[R];
    T *shared = w->a + (E ? R * A * F : 0);
    if (E) {
        product_f32(t, n, w->wide, D, R, l->gate, w->logit, 0, 0, E);
#pragma omp barrier
        for (int64_t r = low(R, 1, t, n); r < low(R, 1, t + 1, n); r++) {
            route_row(w->logit + r * E, l->gate_bias, E, A, m->groups, m->kept_groups, m->sigmoid, m->normalise,
                      m->route_scale, 0, w->score + r * E, w->chosen + r * A, w->weight + r * A);
            if (chosen_out) memcpy(chosen_out + r * A, w->chosen + r * A, A * sizeof(int64_t));
        }
    }
    if (S) { /* before the barrier: needs nobody's choice */
        for (int64_t r = 0; r < R; r++) h[r] = w->h + r * D;
        NAME(swiglu)(t, n, h, R, l->gate_proj, l->up_proj, shared, S);
    }
    if (E) {
#pragma omp barrier
        int64_t at[E];
        memset(begin, 0, sizeof begin); /* every thread sorts for itself: cheaper than meeting once more */
        for (int64_t i = 0; i < R * A; i++) begin[w->chosen[i] + 1]++;
        for (int64_t e = 0; e < E; e++) at[e] = begin[e], begin[e + 1] += begin[e];
        for (int64_t i = 0; i < R * A; i++) {
            const int64_t here = at[w->chosen[i]]++;
            row[here] = i / A, weight[here] = FLOAT(ROUND(w->weight[i]));
        }
        for (int64_t e = 0; e < E; e++) {
            const int64_t many = begin[e + 1] - begin[e];
            if (!many) continue;
            for (int64_t i = 0; i < many; i++) h[i] = w->h + row[begin[e] + i] * D;
            const Matrix gate = NAME(part)(l->gate_up, 2 * e, F), up = NAME(part)(l->gate_up, 2 * e + 1, F);
            NAME(swiglu)(t, n, h, many, gate, up, w->a + begin[e] * F, F);
        }
    }
#pragma omp barrier
    const int64_t from = low(D, OUTS, t, n), to = low(D, OUTS, t + 1, n);
    if (S) NAME(down)(from, to, shared, R, l->down_proj, 0, 0, w->x, D);
    for (int64_t e = 0; e < E; e++) {
        const Matrix down = NAME(part)(l->down, e, D);
        NAME(down)(from, to, w->a + begin[e] * F, begin[e + 1] - begin[e], down, row + begin[e], weight + begin[e],
                   w->x, D);
    }
}

static void NAME(layer)(const Model *m, const Layer *l, const Batch *b, NAME(Work) * w, int t, int n, int64_t *chosen) {
    const int64_t R = b->R, D = m->D, H = m->H, G = m->G, Y = NAME(first_width)(m);
    const int64_t W = m->latent ? m->C + m->rope : m->v, V = m->latent ? m->C : m->v, share = H / G;
    for (int64_t r = low(R, 1, t, n); r < low(R, 1, t + 1, n); r++)
        NAME(norm)(w->x + r * D, l->norm1, l->eps1, D, w->h + r * D, 0);
#pragma omp barrier
    for (int64_t i = 0, at = 0; i < 3; at += l->first[i++].out)
        if (l->first[i].weight) NAME(product)(t, n, w->h, D, R, l->first[i], w->y + at, 0, 0, Y);
#pragma omp barrier
    if (m->latent) NAME(latent_queries)(m, l, b, w, t, n);
    else NAME(plain_heads)(m, l, b, w, 0, t, n);
#pragma omp barrier
    int64_t part = R * G >= n ? share : (share * R * G + n - 1) / n; /* heads that read the keys together */
    part = part < 1 ? 1 : part < ROWS ? part : ROWS;
    const int64_t parts = (share + part - 1) / part;
    for (int64_t i = t; i < w->runs * G * parts; i += n) {
        const int64_t run = i / (G * parts), g = i / parts % G, h = g * share + i % parts * part;
        const int64_t heads = (g + 1) * share - h < part ? (g + 1) * share - h : part;
        const int64_t then = (i + n) / (G * parts), block = then < w->runs ? b->table[w->run[then] * b->J] : -1;
        const T *keys = block < 0 ? 0 : (const T *)l->keys + (block * G + (i + n) / parts % G) * m->size * W;
        NAME(attend)(m, l, b, w->run[run], w->run[run + 1], g, h, heads, W, V, w->query, w->o, keys,
                     w->space + t * w->room);
    }
#pragma omp barrier
    const T *o = w->o;
    if (m->latent) {
        NAME(heads)(t, n, w->o, H * V, V, R, H, l->uv, w->v, H * m->v, m->v);
        o = w->v;
#pragma omp barrier
    }
    NAME(product)(t, n, o, H * m->v, R, l->o, 0, 0, w->x, D);
#pragma omp barrier
    for (int64_t r = low(R, 1, t, n); r < low(R, 1, t + 1, n); r++)
        NAME(norm)(w->x + r * D, l->norm2, l->eps2, D, w->h + r * D, l->gate.weight ? w->wide + r * D : 0);
#pragma omp barrier
    NAME(feed_forward)(m, l, b, w, t, n, chosen);
#pragma omp barrier
}

/* The keys and values of a layer's rows, and nothing else of it. */
static void NAME(keys_only)(const Model *m, const Layer *l, const Batch *b, NAME(Work) * w, int t, int n) {
    const int64_t R = b->R, D = m->D, Y = NAME(first_width)(m), from = low(R, 1, t, n), to = low(R, 1, t + 1, n);
    for (int64_t r = from; r < to; r++) NAME(norm)(w->x + r * D, l->norm1, l->eps1, D, w->h + r * D, 0);
#pragma omp barrier
    for (int64_t i = 1, at = l->first[0].out; i < 3; at += l->first[i++].out)
        if (l->first[i].weight) NAME(product)(t, n, w->h, D, R, l->first[i], w->y + at, 0, 0, Y);
#pragma omp barrier
    if (!m->latent) NAME(plain_heads)(m, l, b, w, m->H, t, n);
    for (int64_t r = from; m->latent && r < to; r++) NAME(latent_entry)(m, l, b, w, r);
#pragma omp barrier
}

/* Rows with one table next to each other, as a prompt's are, attend together: as many as their scores stay in cache. */
static void NAME(find_runs)(const Model *m, const Batch *b, NAME(Work) * w) {
    const int64_t share = m->H / m->G < ROWS ? m->H / m->G : ROWS;
    w->runs = 0;
    for (int64_t r = 0, longest = 0; r < b->R; r++) {
        const int64_t *first = w->run + w->runs - 1, many = w->runs ? (r - *first + 1) * share : 0;
        longest = b->length[r] > longest ? b->length[r] : longest;
        if (!w->runs || many > ROWS || many * (longest + 32) > SCORES ||
            memcmp(b->table + r * b->J, b->table + *first * b->J, b->J * sizeof(int32_t)))
            w->run[w->runs++] = r, longest = b->length[r];
    }
    w->run[w->runs] = b->R;
}

static int64_t NAME(shared)(const Model *m) {
    int64_t most = 0;
    for (int64_t i = 0; i < m->layers; i++) most = m->layer[i].gate_proj.out > most ? m->layer[i].gate_proj.out : most;
    return most;
}

int64_t NAME(shoestring_workspace)(const Model *m, int64_t R, int64_t longest, int64_t threads) {
    NAME(Work) w;
    return NAME(lay)(m, R, longest, threads, NAME(shared)(m), 0, &w);
}

void NAME(shoestring_decode)(const Model *m, const Batch *b) {
    NAME(Work) work;
    Batch kept = *b;
    NAME(lay)(m, b->R, b->longest, b->threads, NAME(shared)(m), b->work, &work);
    NAME(find_runs)(m, b, &work);
#pragma omp parallel num_threads(b->threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        const int64_t D = m->D, end = low(b->R, 1, t + 1, n) * D;
        int64_t *chosen = b->chosen;
#pragma omp simd
        for (int64_t i = low(b->R, 1, t, n) * D; i < end; i++) work.x[i] = FLOAT(((const T *)b->x)[i]);
        for (int64_t i = 0; i < m->layers; i++) {
            if (b->keep && i == m->layers - 1) { /* of the other rows nobody asks for more than keys and values */
                NAME(keys_only)(m, m->layer + i, b, &work, t, n);
#pragma omp single
                {
                    for (int64_t r = 0; r < b->kept; r++) memmove(work.x + r * D, work.x + b->keep[r] * D, D * 4);
                    kept.R = b->kept, kept.length = b->kept_length, kept.table = b->kept_table;
                    NAME(find_runs)(m, &kept, &work);
                }
            }
            NAME(layer)(m, m->layer + i, &kept, &work, t, n, chosen);
            if (chosen && m->layer[i].gate.weight) chosen += b->R * m->A;
        }
        for (int64_t r = low(kept.R, 1, t, n); r < low(kept.R, 1, t + 1, n); r++)
            NAME(norm)(work.x + r * D, m->norm, m->eps, D, (T *)b->hidden + (b->keep ? b->keep[r] : r) * D, 0);
    }
}

/* y [R, out] = x Wᵀ + b in fp32: the head */
void NAME(shoestring_product)(const Matrix *w, const T *x, int64_t R, float *y, int64_t threads) {
#pragma omp parallel num_threads(threads)
    NAME(product)(omp_get_thread_num(), omp_get_num_threads(), x, w->in, R, *w, y, 0, 0, w->out);
}
