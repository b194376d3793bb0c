/* The step for one dtype: T, its vectors and conversions come from decode.c. */

/* ---- products */
INLINE VECTOR NAME(rest)(const T *p, int64_t count) {
#ifdef PAIRED
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
#else
    T padded[WIDE] __attribute__((aligned(64))) = {0};
    memcpy(padded, p, count * sizeof(T));
    return LOAD(padded);
#endif
}

/* Row pointers times weight rows: RT x OT = 16 sums over `in`, row by row. */
INLINE void NAME(block)(int RT, int OT, const T *const *x, const T *const *w, int64_t in, int64_t ahead, float *out) {
    v16 acc[16];
    UNROLL for (int i = 0; i < 16; i++) acc[i] = (v16){0};
    UNROLL for (int o4 = 0; o4 < OT; o4 += 4) { /* four rows of weights at a time, so that memory is read in order */
        int64_t k = 0;
        for (; k + WIDE <= in; k += WIDE) {
            VECTOR a[4];
            UNROLL for (int r = 0; r < RT; r++) a[r] = LOAD(x[r] + k);
            UNROLL for (int o = o4; o < o4 + 4; o++) {
                const VECTOR b = LOAD(w[o] + k);
                if (ahead) __builtin_prefetch(w[o] + k + ahead, 0, 2);
                UNROLL for (int r = 0; r < RT; r++) acc[r * OT + o] = DOT(acc[r * OT + o], a[r], b);
            }
        }
        if (k == in) continue;
        VECTOR a[4]; /* what is left, with zeros behind it */
        UNROLL for (int r = 0; r < RT; r++) a[r] = NAME(rest)(x[r] + k, in - k);
        UNROLL for (int o = o4; o < o4 + 4; o++) {
            const VECTOR b = NAME(rest)(w[o] + k, in - k);
            UNROLL for (int r = 0; r < RT; r++) acc[r * OT + o] = DOT(acc[r * OT + o], a[r], b);
        }
    }
    UNROLL for (int i = 0; i < 8; i++) acc[i] = pairs(acc[2 * i], acc[2 * i + 1]);
    UNROLL for (int i = 0; i < 4; i++) acc[i] = pairs(acc[2 * i], acc[2 * i + 1]);
    *(v16u *)out = pairs(pairs(acc[0], acc[1]), pairs(acc[2], acc[3]));
}

static NOINLINE void NAME(block1)(const T *const *x, const T *const *w, int64_t in, int64_t ahead, float *out) { NAME(block)(1, 16, x, w, in, ahead, out); }
static NOINLINE void NAME(block2)(const T *const *x, const T *const *w, int64_t in, int64_t ahead, float *out) { NAME(block)(2, 8, x, w, in, ahead, out); }
static NOINLINE void NAME(block4)(const T *const *x, const T *const *w, int64_t in, int64_t ahead, float *out) { NAME(block)(4, 4, x, w, in, ahead, out); }

/* n <= ROWS rows times up to OUTS rows of w that are `stride` apart: out [n, OUTS] */
static void NAME(tile)(const T *const *x, int64_t n, const T *w, int64_t stride, int64_t outs, int64_t in, float *out) {
    const T *rows[OUTS];
    const int64_t ahead = OUTS * stride; /* the next tile is fetched while this one is computed */
    float sum[16];
    for (int64_t o = 0; o < OUTS; o++) rows[o] = w + (o < outs ? o : outs - 1) * stride;
    int64_t r = 0;
    for (; r + 4 <= n; r += 4)
        for (int o = 0; o < OUTS; o += 4) {
            if (o >= outs) break;
            NAME(block4)(x + r, rows + o, in, r ? 0 : ahead, sum);
            for (int i = 0; i < 4; i++) memcpy(out + (r + i) * OUTS + o, sum + 4 * i, 16);
        }
    for (; r + 2 <= n; r += 2)
        for (int o = 0; o < OUTS; o += 8) {
            if (o >= outs) break;
            NAME(block2)(x + r, rows + o, in, r ? 0 : ahead, sum);
            for (int i = 0; i < 2; i++) memcpy(out + (r + i) * OUTS + o, sum + 8 * i, 32);
        }
    if (r < n) NAME(block1)(x + r, rows, in, r ? 0 : ahead, out + r * OUTS);
}

INLINE float NAME(bias)(Matrix w, int64_t o) { return w.bias ? FLOAT(((const T *)w.bias)[o]) : 0.0f; }

/* Thread t's share of x Wᵀ + b: into `y` (fp32) or `z` (rounded), or added to `sum`; whichever is not null. */
static void NAME(product)(int t, int n, const T *x, int64_t ldx, int64_t R, Matrix w, float *y, T *z, float *sum, int64_t ldy) {
    const int64_t end = low(w.out, OUTS, t + 1, n);
    float out[ROWS * OUTS];
    const T *rows[ROWS];
    for (int64_t at = low(w.out, OUTS, t, n); at < end; at += OUTS)
        for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
            const int64_t many = R - r0 < ROWS ? R - r0 : ROWS, outs = w.out - at < OUTS ? w.out - at : OUTS;
            for (int64_t r = 0; r < many; r++) rows[r] = x + (r0 + r) * ldx;
            NAME(tile)(rows, many, (const T *)w.weight + at * w.in, w.in, outs, w.in, out);
            for (int64_t r = 0; r < many; r++)
                for (int64_t o = 0; o < outs; o++) {
                    const float s = out[r * OUTS + o] + NAME(bias)(w, at + o);
                    const int64_t place = (r0 + r) * ldy + at + o;
                    if (y) y[place] = s;
                    else if (z) z[place] = ROUND(s);
                    else sum[place] += s;
                }
        }
}

/* A product for each head: x [R, H, in] with W [H, out, in] into z[R, H, :out]. */
static void NAME(heads)(int t, int n, const T *x, int64_t ldx, int64_t step_x, int64_t R, int64_t H, Matrix w, T *z, int64_t ldz, int64_t step_z) {
    const int64_t tiles = (w.out + OUTS - 1) / OUTS, end = low(H * tiles, 1, t + 1, n);
    float out[ROWS * OUTS];
    const T *rows[ROWS];
    for (int64_t i = low(H * tiles, 1, t, n); i < end; i++) {
        const int64_t h = i / tiles, at = i % tiles * OUTS, outs = w.out - at < OUTS ? w.out - at : OUTS;
        for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
            const int64_t many = R - r0 < ROWS ? R - r0 : ROWS;
            for (int64_t r = 0; r < many; r++) rows[r] = x + (r0 + r) * ldx + h * step_x;
            NAME(tile)(rows, many, (const T *)w.weight + (h * w.out + at) * w.in, w.in, outs, w.in, out);
            for (int64_t r = 0; r < many; r++)
                for (int64_t o = 0; o < outs; o++) z[(r0 + r) * ldz + h * step_z + at + o] = ROUND(out[r * OUTS + o]);
        }
    }
}

/* ---- rows */
/* x / sqrt(mean(x²) + eps) * weight, rounded; `wide` gets the rounded numbers as fp32 when not null */
static void NAME(norm)(const float *x, const T *weight, float eps, int64_t D, T *y, float *wide) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < D; d++) square += x[d] * x[d];
    const float r = 1.0f / sqrtf(square / D + eps);
    for (int64_t d = 0; d < D; d++) y[d] = ROUND(x[d] * r * FLOAT(weight[d]));
    if (wide)
        for (int64_t d = 0; d < D; d++) wide[d] = FLOAT(y[d]);
}

/* a head's last `rope` numbers turned by its position, rounded */
static void NAME(turn)(const float *x, const float *cis, int64_t rope, int64_t interleaved, T *y) {
    const int64_t half = rope / 2;
    for (int64_t i = 0; i < half; i++) {
        const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
        const float c = cis[2 * i], s = cis[2 * i + 1], p = FLOAT(ROUND(x[a])), q = FLOAT(ROUND(x[b]));
        y[a] = ROUND(p * c - q * s);
        y[b] = ROUND(q * c + p * s);
    }
}

/* ---- attention of `heads` <= ROWS query heads of one row against one group's blocks */
/* 4 heads times 64 values, or fewer: sums of p_s v_s over the positions of a block */
INLINE void NAME(weigh)(int many, int vectors, const float *const *p, const T *v, int64_t W, int64_t count, float *const *out) {
#ifdef PAIRED
    if (vectors % 2 == 0) {
        const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
        __m512 acc[4][4];
        for (int h = 0; h < many; h++)
            for (int i = 0; i < vectors; i++) acc[h][i] = _mm512_loadu_ps(out[h] + 16 * i);
        for (int64_t s = 0; s < count; s += 2) { /* two positions at a time; a block has an even number of them */
            const T *v0 = v + s * W, *v1 = v0 + W;
            __m512bh b[4];
            for (int i = 0; i < vectors; i += 2) {
                const __m512i a0 = _mm512_loadu_si512(v0 + 16 * i), a1 = _mm512_loadu_si512(v1 + 16 * i);
                b[i] = (__m512bh)_mm512_permutex2var_epi16(a0, first, a1);
                b[i + 1] = (__m512bh)_mm512_permutex2var_epi16(a0, second, a1);
            }
            for (int h = 0; h < many; h++) {
                int32_t two;
                memcpy(&two, (const T *)p[h] + s, 4);
                for (int i = 0; i < vectors; i++) acc[h][i] = _mm512_dpbf16_ps(acc[h][i], (__m512bh)_mm512_set1_epi32(two), b[i]);
            }
        }
        for (int h = 0; h < many; h++)
            for (int i = 0; i < vectors; i++) _mm512_storeu_ps(out[h] + 16 * i, acc[h][i]);
        return;
    }
#endif
    v16 acc[4][4];
    for (int h = 0; h < many; h++)
        for (int i = 0; i < vectors; i++) acc[h][i] = *(v16u *)(out[h] + 16 * i);
    for (int64_t s = 0; s < count; s++)
        for (int i = 0; i < vectors; i++) {
            const v16 b = WIDEN(v + s * W + 16 * i);
            for (int h = 0; h < many; h++) acc[h][i] += FLOAT(((const T *)p[h])[s]) * b;
        }
    for (int h = 0; h < many; h++)
        for (int i = 0; i < vectors; i++) *(v16u *)(out[h] + 16 * i) = acc[h][i];
}

static void NAME(weigh4)(const float *const *p, const T *v, int64_t W, int64_t count, float *const *out) { NAME(weigh)(4, 4, p, v, W, count, out); }
static void NAME(weigh1)(const float *const *p, const T *v, int64_t W, int64_t count, float *const *out) { NAME(weigh)(1, 4, p, v, W, count, out); }
static void NAME(weigh4_1)(const float *const *p, const T *v, int64_t W, int64_t count, float *const *out) { NAME(weigh)(4, 1, p, v, W, count, out); }
static void NAME(weigh1_1)(const float *const *p, const T *v, int64_t W, int64_t count, float *const *out) { NAME(weigh)(1, 1, p, v, W, count, out); }

static void NAME(values)(int64_t heads, const float *p, int64_t ldp, const T *v, int64_t W, int64_t V, int64_t count, float *out) {
    for (int64_t h = 0; h < heads;) {
        const int four = heads - h >= 4;
        const float *ps[4];
        float *outs[4];
        int64_t c = 0;
        for (; c + 64 <= V; c += 64) {
            for (int i = 0; i < 4; i++) ps[i] = p + (h + (four ? i : 0)) * ldp, outs[i] = out + (h + (four ? i : 0)) * V + c;
            (four ? NAME(weigh4) : NAME(weigh1))(ps, v + c, W, count, outs);
        }
        for (; c + 16 <= V; c += 16) {
            for (int i = 0; i < 4; i++) ps[i] = p + (h + (four ? i : 0)) * ldp, outs[i] = out + (h + (four ? i : 0)) * V + c;
            (four ? NAME(weigh4_1) : NAME(weigh1_1))(ps, v + c, W, count, outs);
        }
        for (; c < V; c++)
            for (int i = 0; i < (four ? 4 : 1); i++)
                for (int64_t s = 0; s < count; s++) out[(h + i) * V + c] += FLOAT(((const T *)(p + (h + i) * ldp))[s]) * FLOAT(v[s * W + c]);
        h += four ? 4 : 1;
    }
}

/* o [heads, V] = softmax(scale q Kᵀ) V; `space`: fp32 [heads, ld] scores, then [heads, V] sums */
static void NAME(attend)(const Model *m, const Layer *l, const Batch *b, int64_t r, int64_t g, const T *q, int64_t heads, int64_t W, int64_t V, T *o, float *space) {
    const int64_t length = b->length[r], size = m->size, ld = (b->longest + 15) / 16 * 16 + 16;
    const int32_t *table = b->table + r * b->J;
    float *score = space, *sum = space + heads * ld, out[ROWS * OUTS];
    const T *rows[ROWS];
    for (int64_t h = 0; h < heads; h++) rows[h] = q + h * W;
    for (int64_t s0 = 0; s0 < length; s0 += size) {
        const T *keys = (const T *)l->keys + (table[s0 / size] * m->G + g) * size * W;
        const int64_t count = length - s0 < size ? length - s0 : size;
        for (int64_t s = 0; s < count; s += OUTS) {
            const int64_t outs = count - s < OUTS ? count - s : OUTS;
            NAME(tile)(rows, heads, keys + s * W, W, outs, W, out);
            for (int64_t h = 0; h < heads; h++) memcpy(score + h * ld + s0 + s, out + h * OUTS, outs * sizeof(float));
        }
    }
    for (int64_t h = 0; h < heads; h++) {
        float *p = score + h * ld, top = -INFINITY, total = 0;
        for (int64_t s = 0; s < length; s++) top = p[s] > top ? p[s] : top;
#pragma omp simd reduction(+ : total)
        for (int64_t s = 0; s < length; s++) {
            p[s] = exp1((p[s] - top) * m->scale);
            total += p[s];
        }
        const float share = 1.0f / total;
        T *rounded = (T *)p; /* in place: never wider than what it overwrites */
        for (int64_t s = 0; s < length; s++) rounded[s] = ROUND(p[s] * share);
        rounded[length] = ROUND(0.0f); /* the partner of the last one, when that is alone */
    }
    memset(sum, 0, heads * V * sizeof(float));
    for (int64_t s0 = 0; s0 < length; s0 += size) {
        const T *values = (const T *)l->values + (table[s0 / size] * m->G + g) * size * W;
        const float *p = (const float *)((const T *)score + s0);
        NAME(values)(heads, p, ld, values, W, V, length - s0 < size ? length - s0 : size, sum);
    }
    for (int64_t i = 0; i < heads * V; i++) o[i] = ROUND(sum[i]);
}

/* ---- a step */
typedef struct {
    float *x, *wide, *y, *q;      /* residual [R, D]; the normed row; the first products; q_b's */
    T *h, *c, *nope, *query, *o, *v, *a; /* normed row; normed query latent; q_nope; queries; attended; values; SwiGLU */
    float *logit, *score, *weight, *space;
    int64_t *chosen;
} NAME(Work);

INLINE char *NAME(take)(char **at, int64_t bytes) {
    char *here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

static int64_t NAME(first_width)(const Model *m) {
    return m->latent ? (m->q_lora ? m->q_lora : m->H * (m->nope + m->rope)) + m->C + m->rope : (m->H + 2 * m->G) * m->v;
}

static int64_t NAME(lay)(const Model *m, int64_t R, int64_t longest, int64_t threads, int64_t shared, char *base, NAME(Work) *w) {
    const int64_t W = m->latent ? m->C + m->rope : m->v, V = m->latent ? m->C : m->v;
    const int64_t wide = m->A * m->F + shared, heads = m->H < ROWS ? m->H : ROWS;
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
    w->space = (float *)NAME(take)(&at, threads * heads * ((longest + 15) / 16 * 16 + 16 + V) * 4);
    return at - base;
}

/* the queries in the order of the cache's entries, and this token's entry written */
static void NAME(latent_queries)(const Model *m, const Layer *l, const Batch *b, NAME(Work) *w, int t, int n) {
    const int64_t R = b->R, H = m->H, K = m->nope + m->rope, W = m->C + m->rope, Y = NAME(first_width)(m);
    for (int64_t r = low(R, 1, t, n); r < low(R, 1, t + 1, n); r++) {
        const int64_t at = b->length[r] - 1;
        const float *cis = b->turn + at * m->rope, *y = w->y + r * Y + Y - W;
        T *entry = (T *)l->keys + ((int64_t)b->table[r * b->J + at / m->size] * m->size + at % m->size) * W;
        NAME(norm)(y, l->k_norm, l->k_eps, m->C, entry, 0);
        NAME(turn)(y + m->C, cis, m->rope, m->interleaved, entry + m->C);
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
        for (int64_t d = 0; d < m->nope; d++) w->nope[i * m->nope + d] = ROUND(from[d]);
        NAME(turn)(from + m->nope, cis, m->rope, m->interleaved, w->query + i * W + m->C);
    }
#pragma omp barrier
    const Matrix uk = {l->uk, 0, m->C, m->nope};
    NAME(heads)(t, n, w->nope, H * m->nope, m->nope, R, H, uk, w->query, H * W, W);
}

static void NAME(plain_queries)(const Model *m, const Layer *l, const Batch *b, NAME(Work) *w, int t, int n) {
    const int64_t R = b->R, H = m->H, G = m->G, K = m->v, Y = NAME(first_width)(m);
    T head[K];
    float wide[K];
    for (int64_t i = low(R * (H + G), 1, t, n); i < low(R * (H + G), 1, t + 1, n); i++) {
        const int64_t r = i / (H + G), h = i % (H + G), at = b->length[r] - 1, g = h - H;
        const int64_t block = b->table[r * b->J + at / m->size], slot = ((block * G + g) * m->size + at % m->size) * K;
        const float *from = w->y + r * Y + h * K;
        const T *weight = h < H ? l->q_norm : l->k_norm;
        if (weight) NAME(norm)(from, weight, h < H ? l->q_eps : l->k_eps, K, head, wide), from = wide;
        NAME(turn)(from, b->turn + at * m->rope, m->rope, m->interleaved, h < H ? w->query + (r * H + h) * K : (T *)l->keys + slot);
        if (h >= H)
            for (int64_t d = 0; d < K; d++) ((T *)l->values + slot)[d] = ROUND(w->y[r * Y + (H + G + g) * K + d]);
    }
}

/* silu(gate) · up of thread t's share of the columns, for rows of h, into a[i * lda] */
static void NAME(swiglu)(int t, int n, const T *const *h, int64_t R, int64_t in, const T *gate, const T *up, Matrix bg, Matrix bu, int64_t F, T *a, int64_t lda) {
    float g[ROWS * OUTS], u[ROWS * OUTS];
    const int64_t end = low(F, OUTS, t + 1, n);
    for (int64_t at = low(F, OUTS, t, n); at < end; at += OUTS)
        for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
            const int64_t many = R - r0 < ROWS ? R - r0 : ROWS, outs = F - at < OUTS ? F - at : OUTS;
            NAME(tile)(h + r0, many, gate + at * in, in, outs, in, g);
            NAME(tile)(h + r0, many, up + at * in, in, outs, in, u);
            for (int64_t r = 0; r < many; r++) {
                float z[OUTS];
#pragma omp simd
                for (int64_t o = 0; o < OUTS; o++) {
                    const float s = FLOAT(ROUND(g[r * OUTS + o]));
                    z[o] = s / (1.0f + exp1(-s)) * u[r * OUTS + o];
                }
                if (bg.bias || bu.bias)
                    for (int64_t o = 0; o < outs; o++) {
                        const float s = g[r * OUTS + o] + NAME(bias)(bg, at + o);
                        z[o] = s / (1.0f + exp1(-s)) * (u[r * OUTS + o] + NAME(bias)(bu, at + o));
                    }
                for (int64_t o = 0; o < outs; o++) a[(r0 + r) * lda + at + o] = ROUND(z[o]);
            }
        }
}

/* y[row[i]] += weight[i] · W a[i] for thread t's share of the columns; row null: i itself, weight null: 1 */
static void NAME(down)(int64_t from, int64_t to, const T *a, int64_t count, Matrix w, const int64_t *row, const float *weight, float *y, int64_t D) {
    float out[ROWS * OUTS];
    const T *rows[ROWS];
    for (int64_t at = from; at < to; at += OUTS)
        for (int64_t i0 = 0; i0 < count; i0 += ROWS) {
            const int64_t many = count - i0 < ROWS ? count - i0 : ROWS, outs = D - at < OUTS ? D - at : OUTS;
            for (int64_t i = 0; i < many; i++) rows[i] = a + (i0 + i) * w.in;
            NAME(tile)(rows, many, (const T *)w.weight + at * w.in, w.in, outs, w.in, out);
            for (int64_t i = 0; i < many; i++) {
                float *to_row = y + (row ? row[i0 + i] : i0 + i) * D + at;
                const float by = weight ? weight[i0 + i] : 1.0f;
                for (int64_t o = 0; o < outs; o++) to_row[o] += by * (out[i * OUTS + o] + NAME(bias)(w, at + o));
            }
        }
}

static void NAME(feed_forward)(const Model *m, const Layer *l, const Batch *b, NAME(Work) *w, int t, int n, int64_t *chosen_out) {
    const int64_t R = b->R, D = m->D, E = l->gate.weight ? m->E : 0, A = m->A, F = m->F, S = l->gate_proj.out;
    const Matrix none = {0, 0, 0, 0};
    int64_t begin[E + 1], row[E ? R * A : 1];
    float weight[E ? R * A : 1];
    const T *h[R];
    T *shared = w->a + (E ? R * A * F : 0);
    if (E) {
        product_f32(t, n, w->wide, D, R, l->gate, w->logit, 0, 0, E);
#pragma omp barrier
        for (int64_t r = low(R, 1, t, n); r < low(R, 1, t + 1, n); r++) {
            route(m, l, w->logit + r * E, w->score + r * E, w->chosen + r * A, w->weight + r * A);
            if (chosen_out) memcpy(chosen_out + r * A, w->chosen + r * A, A * sizeof(int64_t));
        }
    }
    if (S) { /* before the barrier: needs nobody's choice */
        for (int64_t r = 0; r < R; r++) h[r] = w->h + r * D;
        NAME(swiglu)(t, n, h, R, D, l->gate_proj.weight, l->up_proj.weight, l->gate_proj, l->up_proj, S, shared, S);
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
            const T *up = (const T *)l->gate_up + (2 * e + 1) * F * D, *gate = up - F * D;
            NAME(swiglu)(t, n, h, many, D, gate, up, none, none, F, w->a + begin[e] * F, F);
        }
    }
#pragma omp barrier
    const int64_t from = low(D, OUTS, t, n), to = low(D, OUTS, t + 1, n);
    if (S) NAME(down)(from, to, shared, R, l->down_proj, 0, 0, w->x, D);
    for (int64_t e = 0; e < E; e++) {
        const Matrix down = {(const T *)l->down + e * D * F, 0, D, F};
        NAME(down)(from, to, w->a + begin[e] * F, begin[e + 1] - begin[e], down, row + begin[e], weight + begin[e], w->x, D);
    }
}

static void NAME(layer)(const Model *m, const Layer *l, const Batch *b, NAME(Work) *w, int t, int n, int64_t *chosen) {
    const int64_t R = b->R, D = m->D, H = m->H, G = m->G, Y = NAME(first_width)(m);
    const int64_t W = m->latent ? m->C + m->rope : m->v, V = m->latent ? m->C : m->v, share = H / G;
    for (int64_t r = low(R, 1, t, n); r < low(R, 1, t + 1, n); r++) NAME(norm)(w->x + r * D, l->norm1, l->eps1, D, w->h + r * D, 0);
#pragma omp barrier
    for (int64_t i = 0, at = 0; i < 3; at += l->first[i++].out)
        if (l->first[i].weight) NAME(product)(t, n, w->h, D, R, l->first[i], w->y + at, 0, 0, Y);
#pragma omp barrier
    if (m->latent) NAME(latent_queries)(m, l, b, w, t, n);
    else NAME(plain_queries)(m, l, b, w, t, n);
#pragma omp barrier
    int64_t part = R * G >= n ? share : (share * R * G + n - 1) / n; /* heads that read the keys together */
    part = part < 1 ? 1 : part < ROWS ? part : ROWS;
    const int64_t parts = (share + part - 1) / part;
    float *space = w->space + t * (H < ROWS ? H : ROWS) * ((b->longest + 15) / 16 * 16 + 16 + V);
    for (int64_t i = t; i < R * G * parts; i += n) {
        const int64_t r = i / (G * parts), g = i / parts % G, h = g * share + i % parts * part;
        const int64_t many = (g + 1) * share - h < part ? (g + 1) * share - h : part;
        NAME(attend)(m, l, b, r, g, w->query + (r * H + h) * W, many, W, V, w->o + (r * H + h) * V, space);
    }
#pragma omp barrier
    const T *o = w->o;
    if (m->latent) {
        const Matrix uv = {l->uv, 0, m->v, m->C};
        NAME(heads)(t, n, w->o, H * V, V, R, H, uv, w->v, H * m->v, m->v);
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
    NAME(lay)(m, b->R, b->longest, b->threads, NAME(shared)(m), b->work, &work);
#pragma omp parallel num_threads(b->threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        const int64_t from = low(b->R, 1, t, n), to = low(b->R, 1, t + 1, n), D = m->D;
        int64_t *chosen = b->chosen;
        for (int64_t i = from * D; i < to * D; i++) work.x[i] = FLOAT(((const T *)b->x)[i]);
        for (int64_t i = 0; i < m->layers; i++) {
            NAME(layer)(m, m->layer + i, b, &work, t, n, chosen);
            if (chosen && m->layer[i].gate.weight) chosen += b->R * m->A;
        }
        for (int64_t r = from; r < to; r++) NAME(norm)(work.x + r * D, m->norm, m->eps, D, (T *)b->hidden + r * D, 0);
    }
}
