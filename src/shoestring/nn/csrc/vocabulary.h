/* Softmax over the vocabulary for one dtype T. */

/* Rows of logits x [N, V], divided by the temperature: log p of the ids, and the entropy where it is not null. With
   `slope` the logits are overwritten by softmax - onehot; p - 1 of a likely target keeps its digits. */
void NAME(vocabulary)(T *x, const int64_t *ids, float temperature, int64_t N, int64_t V, float *logp, float *entropy,
                      int64_t slope, int threads) {
    const float by = 1.0f / temperature;
#pragma omp parallel num_threads(share(threads, N * V))
    {
        float *p = malloc(V * sizeof(float) + 1);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            T *row = x + n * V;
            float top = -INFINITY;
#pragma omp simd reduction(max : top)
            for (int64_t v = 0; v < V; v++) {
                p[v] = FLOAT(row[v]) * by;
                top = p[v] > top ? p[v] : top;
            }
            const float target = p[ids[n]] - top;
            double total = 0, weighted = 0;
            for (int64_t start = 0; start < V; start += 4096) {
                const int64_t end = start + 4096 < V ? start + 4096 : V;
                float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
                for (int64_t v = start; v < end; v++) {
                    const float z = p[v] - top;
                    p[v] = exp1(z);
                    sum += p[v];
                    dot += z < -87.0f ? 0.0f : p[v] * z;
                }
                total += sum;
                weighted += dot;
            }
            logp[n] = (float)(target - log(total));
            if (entropy) entropy[n] = (float)(log(total) - weighted / total);
            if (!slope) continue;
            const float share = (float)(1.0 / total);
            for (int64_t v = 0; v < V; v++) row[v] = ROUND(p[v] * share);
            row[ids[n]] = ROUND(expm1f(logp[n]));
        }
        free(p);
    }
}

/* The same where a row is seen V logits at a time, of which the first is token `first`: read them all, then make all of
   their slopes. Seen must hold {-INFINITY, 0, 0, 0} before. */
void NAME(logits_read)(const T *x, const int64_t *ids, float temperature, int64_t N, int64_t V, int64_t first,
                       Seen *seen, int threads) {
    const float by = 1.0f / temperature;
#pragma omp parallel for schedule(static) num_threads(share(threads, N * V))
    for (int64_t n = 0; n < N; n++) {
        const T *row = x + n * V;
        Seen *s = seen + n;
        for (int64_t start = 0; start < V; start += 2048) {
            const int64_t end = start + 2048 < V ? start + 2048 : V;
            float top = (float)s->top, sum = 0, dot = 0;
#pragma omp simd reduction(max : top)
            for (int64_t v = start; v < end; v++) {
                const float z = FLOAT(row[v]) * by;
                top = z > top ? z : top;
            }
#pragma omp simd reduction(+ : sum, dot)
            for (int64_t v = start; v < end; v++) {
                const float z = FLOAT(row[v]) * by - top, e = exp1(z);
                sum += e;
                dot += z < -87.0f ? 0.0f : e * z;
            }
            const double less = s->sum ? s->top - top : 0, factor = exp(less);
            s->dot = factor * (s->dot + less * s->sum) + dot;
            s->sum = factor * s->sum + sum;
            s->top = top;
        }
        if (ids[n] >= first && ids[n] < first + V) s->target = FLOAT(row[ids[n] - first]) * by;
    }
}

void NAME(logits_slope)(T *x, const int64_t *ids, float temperature, int64_t N, int64_t V, int64_t first,
                        const Seen *seen, int threads) {
    const float by = 1.0f / temperature;
#pragma omp parallel for schedule(static) num_threads(share(threads, N * V))
    for (int64_t n = 0; n < N; n++) {
        T *row = x + n * V;
        const float top = (float)seen[n].top, part = (float)(1.0 / seen[n].sum);
#pragma omp simd
        for (int64_t v = 0; v < V; v++) row[v] = ROUND(exp1(FLOAT(row[v]) * by - top) * part);
        if (ids[n] >= first && ids[n] < first + V)
            row[ids[n] - first] = ROUND((float)expm1(seen[n].target - seen[n].top - log(seen[n].sum)));
    }
}
