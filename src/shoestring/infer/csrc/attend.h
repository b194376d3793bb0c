/* Rows for one dtype T: norm, rotation, and attention of one row over its blocks. */

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
INLINE void NAME(turn_by)(const float *restrict x, const float *restrict cis, int64_t half, int64_t step, int64_t apart,
                          T *restrict y) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float c = cis[2 * i], s = cis[2 * i + 1];
        const float p = FLOAT(ROUND(x[step * i])), q = FLOAT(ROUND(x[step * i + apart]));
        y[step * i] = ROUND(p * c - q * s);
        y[step * i + apart] = ROUND(q * c + p * s);
    }
}

static void NAME(turn)(const float *x, const float *cis, int64_t rope, int64_t interleaved, T *y) {
    if (interleaved) NAME(turn_by)(x, cis, rope / 2, 2, 1, y);
    else NAME(turn_by)(x, cis, rope / 2, 1, rope / 2, y);
}

/* ---- attention of rows with one table, `heads` query heads of each, against one group's blocks. What a row gets does
   not depend on the others: keys behind its own length have weight 0. */
/* keys [count <= 16, W] -> a packed tile, zeros for those that are not there */
static void NAME(turned)(const T *keys, int64_t W, int64_t count, T *to) {
#ifdef WIDE
    for (int64_t i = 0, last = W / PAIR - 16;; i = i + 16 < last ? i + 16 : last) { /* the last square over its neighbour */
        vf r[16];
        UNROLL for (int j = 0; j < 16; j++) r[j] = j < count ? *(const vfu *)(keys + j * W + i * PAIR) : (vf){0};
        turn16(r);
        UNROLL for (int j = 0; j < 16; j++) *(vfu *)(to + (i + j) * PAIR * OUTS) = r[j];
        if (i == last) break;
    }
#else
    memset(to, 0, TILE(W) * sizeof(T));
    for (int64_t s = 0; s < count; s++)
        for (int64_t k = 0; k < W; k++) to[k / PAIR * PAIR * OUTS + s * PAIR + k % PAIR] = keys[s * W + k];
#endif
}

/* values [steps * PAIR, W], the first V columns -> packed tiles for a sum over positions, zeros behind V */
static void NAME(laid)(const T *values, int64_t W, int64_t V, int64_t steps, T *to) {
    for (int64_t c = 0; c < V; c += OUTS) {
        const T *from = values + c;
        for (int64_t k = 0; k < steps; k++, from += PAIR * W, to += PAIR * OUTS) {
            if (V - c >= OUTS) {
                *(v16u *)to = NAME(beside)(from, W);
                continue;
            }
            memset(to, 0, PAIR * OUTS * sizeof(T));
            for (int64_t o = 0; o < V - c; o++)
                for (int p = 0; p < PAIR; p++) to[o * PAIR + p] = from[p * W + o];
        }
    }
}

/* q K^T for up to GROUP positions into score [n, ld], whole tiles; meanwhile as much is fetched of what comes later */
static void NAME(scores)(const T *const *q, int64_t n, const T *keys, int64_t W, int64_t count, const T *const *later,
                         T *room, float *score, int64_t ld) {
    float out[ROWS * GROUP];
    for (int64_t s = 0; s < count; s += OUTS) {
        const int64_t many = count - s < OUTS ? count - s : OUTS;
        for (int i = 0; i < 2; i++)
            for (int64_t k = 0; later[i] && k < many * W; k += 64 / (int64_t)sizeof(T))
                __builtin_prefetch(later[i] + s * W + k, 0, 2);
        if (TURNS(W)) {
            NAME(turned)(keys + s * W, W, many, room + s / OUTS * TILE(W));
            continue;
        }
        NAME(tile)(q, n, keys + s * W, W, many, W, 0, out);
        for (int64_t i = 0; i < n; i++) memcpy(score + i * ld + s, out + i * GROUP, OUTS * sizeof(float));
    }
    if (TURNS(W)) NAME(group)(q, n, room, (count + OUTS - 1) / OUTS, W, 0, 0, score, ld);
}

/* e^(scale (s - largest)) of `length` scores, rounded in place, then zeros up to `whole`; returns one over their sum */
static float NAME(softmax)(float *score, int64_t length, int64_t whole, float scale) {
    vf most = same(-1e34f), total = {0};
    float top = -1e34f, sum = 0;
    for (int64_t s = length; s < whole; s++) score[s] = -1e34f;
    for (int64_t s = 0; s < whole; s += LANES) most = larger(*(vfu *)(score + s), most);
    for (int i = 0; i < LANES; i++) top = most[i] > top ? most[i] : top;
    const float by = scale * 1.44269504088896341f;
    for (int64_t s = 0; s < whole; s += LANES) { /* as many read before so many are written */
        const vf e = power2(EXACTLY, (*(vfu *)(score + s) - top) * by);
        total += e;
        NAME(put)((T *)score + s, e);
    }
    for (int i = 0; i < LANES; i++) sum += total[i];
    return 1.0f / sum;
}

/* where the rows of group g's keys or values from position s on lie, and in `end` where they end: those of a block, and
   not more than GROUP */
INLINE const T *NAME(piece)(const Model *m, const void *arena, const int32_t *table, int64_t g, int64_t W, int64_t s,
                            int64_t length, int64_t *end) {
    const int64_t within = s % m->size, left = m->size - within < GROUP ? m->size - within : GROUP;
    *end = length - s < left ? length : s + left;
    return (const T *)arena + ((table[s / m->size] * m->G + g) * m->size + within) * W;
}

/* o [R, H, V] = softmax(scale q K^T) V for query [R, H, W], rows [r, end) and heads [h, h + heads) of group g; `then`:
   keys that are asked for next; `space` is a thread's */
static void NAME(attend)(const Model *m, const Layer *l, const Batch *b, int64_t r, int64_t end, int64_t g, int64_t h,
                         int64_t heads, int64_t W, int64_t V, const T *query, T *o, const T *then, float *space) {
    int64_t longest = 0, s1;
    for (int64_t i = r; i < end; i++) longest = b->length[i] > longest ? b->length[i] : longest;
    const int64_t n = (end - r) * heads, whole = (longest + 15) / 16 * 16;
    const int64_t ld = whole + 16, ldv = (V + 15) / 16 * 16; /* a block's last tile may stand over */
    const int32_t *table = b->table + r * b->J;
    float *sum = space, *score = sum + ROWS * ldv, share[ROWS];
    T room[GROUP * (TURNS(W) && W > ldv ? W : ldv)] __attribute__((aligned(64)));
    const T *rows[ROWS];
    int64_t place[ROWS];
    for (int64_t i = 0; i < n; i++) {
        place[i] = (r + i / heads) * m->H + h + i % heads;
        rows[i] = query + place[i] * W;
    }
    for (int64_t s0 = 0; s0 < longest; s0 = s1) {
        int64_t s2;
        const T *keys = NAME(piece)(m, l->keys, table, g, W, s0, longest, &s1), *later[2] = {then, 0};
        if (s1 < longest) later[0] = NAME(piece)(m, l->keys, table, g, W, s1, longest, &s2);
        if (!m->latent) later[1] = NAME(piece)(m, l->values, table, g, W, s0, longest, &s2);
        NAME(scores)(rows, n, keys, W, s1 - s0, later, room, score + s0, ld);
    }
    for (int64_t i = 0; i < n; i++) {
        share[i] = NAME(softmax)(score + i * ld, b->length[r + i / heads], whole, m->scale);
        rows[i] = (const T *)(score + i * ld);
    }
    for (int64_t s0 = 0; s0 < longest; s0 = s1) {
        const T *values = NAME(piece)(m, l->values, table, g, W, s0, longest, &s1);
        const int64_t steps = (s1 - s0 + PAIR - 1) / PAIR; /* a block has an even number of positions */
        NAME(laid)(values, W, V, steps, room);
        for (int64_t c = 0; c < ldv; c += GROUP)
            NAME(group)(rows, n, room + c * steps * PAIR, ldv - c < GROUP ? (ldv - c) / OUTS : GROUP / OUTS,
                        steps * PAIR, 0, s0 > 0, sum + c, ldv);
        for (int64_t i = 0; i < n; i++) rows[i] += s1 - s0;
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < V; c++) o[place[i] * V + c] = ROUND(sum[i * ldv + c] * share[i]);
}
