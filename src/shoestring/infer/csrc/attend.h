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

/* ---- attention of `heads` <= ROWS query heads of one row against one group's blocks */
/* 4 heads times 64 values, or fewer: sums of p_s v_s over the positions of a block */
INLINE void NAME(weigh)(int many, int vectors, const float *const *p, const T *v, int64_t W, int64_t count,
                        float *const *out) {
#ifdef PAIRED
    if (vectors % 2 == 0) {
        const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                               6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
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
                for (int i = 0; i < vectors; i++)
                    acc[h][i] = _mm512_dpbf16_ps(acc[h][i], (__m512bh)_mm512_set1_epi32(two), b[i]);
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

static void NAME(weigh4)(const float *const *p, const T *v, int64_t W, int64_t count, float *const *out) {
    NAME(weigh)(4, 4, p, v, W, count, out);
}
static void NAME(weigh1)(const float *const *p, const T *v, int64_t W, int64_t count, float *const *out) {
    NAME(weigh)(1, 4, p, v, W, count, out);
}
static void NAME(weigh4_1)(const float *const *p, const T *v, int64_t W, int64_t count, float *const *out) {
    NAME(weigh)(4, 1, p, v, W, count, out);
}
static void NAME(weigh1_1)(const float *const *p, const T *v, int64_t W, int64_t count, float *const *out) {
    NAME(weigh)(1, 1, p, v, W, count, out);
}

static void NAME(values)(int64_t heads, const float *p, int64_t ldp, const T *v, int64_t W, int64_t V, int64_t count,
                         float *out) {
    float spare[64]; /* what a fourth head, there only to fill up, would get */
    memset(spare, 0, sizeof spare);
    for (int64_t h = 0; h < heads;) {
        const int many = heads - h >= 4 ? 4 : heads - h == 3 ? 3 : 1;
        const float *ps[4];
        float *outs[4];
        int64_t c = 0;
        for (int i = 0; i < 4; i++) ps[i] = p + (h + (i < many ? i : 0)) * ldp;
        for (; c + 64 <= V; c += 64) {
            for (int i = 0; i < 4; i++) outs[i] = i < many ? out + (h + i) * V + c : spare;
            (many > 1 ? NAME(weigh4) : NAME(weigh1))(ps, v + c, W, count, outs);
        }
        for (; c + 16 <= V; c += 16) {
            for (int i = 0; i < 4; i++) outs[i] = i < many ? out + (h + i) * V + c : spare;
            (many > 1 ? NAME(weigh4_1) : NAME(weigh1_1))(ps, v + c, W, count, outs);
        }
        for (; c < V; c++)
            for (int i = 0; i < many; i++)
                for (int64_t s = 0; s < count; s++)
                    out[(h + i) * V + c] += FLOAT(((const T *)(p + (h + i) * ldp))[s]) * FLOAT(v[s * W + c]);
        h += many;
    }
}

/* o [heads, V] = softmax(scale q Kᵀ) V; `space`: fp32 [heads, ld] scores, then [heads, V] sums */
static void NAME(attend)(const Model *m, const Layer *l, const Batch *b, int64_t r, int64_t g, const T *q,
                         int64_t heads, int64_t W, int64_t V, T *o, float *space) {
    const int64_t length = b->length[r], size = m->size, ld = (b->longest + 15) / 16 * 16 + 16;
    const int32_t *table = b->table + r * b->J;
    float *score = space, *sum = space + heads * ld, out[ROWS * GROUP];
    const T *rows[ROWS];
    for (int64_t h = 0; h < heads; h++) rows[h] = q + h * W;
    for (int64_t s0 = 0; s0 < length; s0 += size) {
        const T *keys = (const T *)l->keys + (table[s0 / size] * m->G + g) * size * W;
        const int64_t count = length - s0 < size ? length - s0 : size;
        for (int64_t s = 0; s < count; s += OUTS) {
            const int64_t outs = count - s < OUTS ? count - s : OUTS;
            NAME(tile)(rows, heads, keys + s * W, W, outs, W, OUTS * W, out);
            for (int64_t h = 0; h < heads; h++) memcpy(score + h * ld + s0 + s, out + h * GROUP, outs * sizeof(float));
        }
    }
    for (int64_t h = 0; h < heads; h++) {
        float *p = score + h * ld, top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
        for (int64_t s = 0; s < length; s++) top = p[s] > top ? p[s] : top;
#pragma omp simd reduction(+ : total)
        for (int64_t s = 0; s < length; s++) {
            p[s] = exp1((p[s] - top) * m->scale);
            total += p[s];
        }
        const float share = 1.0f / total;
        T *rounded = (T *)p; /* in place, 16 read before so many are written; there is room behind the last */
        for (int64_t s = 0; s < length; s += 16) {
            float wide[16];
            for (int i = 0; i < 16; i++) wide[i] = p[s + i] * share;
            for (int i = 0; i < 16; i++) rounded[s + i] = ROUND(wide[i]);
        }
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
