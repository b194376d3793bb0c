/* The router's product for one dtype T of tokens; its weights w [E, D] and its logits [N, E] are fp32. */

/* logit = x wᵀ */
void NAME(gate_forward)(const T *x, const float *w, int64_t N, int64_t D, int64_t E, float *logit, int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, N * D))
    for (int64_t n = 0; n < N; n++) {
        float wide[D], *to = logit + n * E;
        for (int64_t d = 0; d < D; d++) wide[d] = FLOAT(x[n * D + d]);
        int64_t e = 0;
        for (; e + 4 <= E; e += 4) { /* four chains of sums, so that none waits for itself */
            const float *a = w + e * D, *b = a + D, *c = b + D, *f = c + D;
            float p = 0, q = 0, r = 0, s = 0;
#pragma omp simd reduction(+ : p, q, r, s)
            for (int64_t d = 0; d < D; d++) {
                p += wide[d] * a[d], q += wide[d] * b[d];
                r += wide[d] * c[d], s += wide[d] * f[d];
            }
            to[e] = p, to[e + 1] = q, to[e + 2] = r, to[e + 3] = s;
        }
        for (; e < E; e++) {
            float p = 0;
#pragma omp simd reduction(+ : p)
            for (int64_t d = 0; d < D; d++) p += wide[d] * w[e * D + d];
            to[e] = p;
        }
    }
}

/* dx = dlogit w */
void NAME(gate_tokens)(const float *dlogit, const float *w, int64_t N, int64_t D, int64_t E, T *dx, int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, N * D))
    for (int64_t n = 0; n < N; n++)
        for (int64_t start = 0; start < D; start += STRIP) {
            const int64_t many = D - start < STRIP ? D - start : STRIP;
            float sum[STRIP] = {0};
            int64_t e = 0;
            for (; many == STRIP && e + 4 <= E; e += 4) { /* the sums are read and written once for four */
                const float *by = dlogit + n * E + e, *a = w + e * D + start, *b = a + D, *c = b + D, *f = c + D;
                for (int64_t i = 0; i < STRIP; i++) sum[i] += by[0] * a[i] + by[1] * b[i] + by[2] * c[i] + by[3] * f[i];
            }
            for (; e < E; e++)
                for (int64_t i = 0; i < many; i++) sum[i] += dlogit[n * E + e] * w[e * D + start + i];
            for (int64_t i = 0; i < many; i++) dx[n * D + start + i] = ROUND(sum[i]);
        }
}

/* dw = dlogitᵀ x: a thread has whole columns, summed over BLOCK rows at a time */
void NAME(gate_weights)(const float *dlogit, const T *x, int64_t N, int64_t D, int64_t E, float *dw, int threads) {
    memset(dw, 0, E * D * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(share(threads, N * D))
    for (int64_t start = 0; start < D; start += STRIP) {
        const int64_t many = D - start < STRIP ? D - start : STRIP;
        float sum[E * STRIP], wide[4][STRIP];
        for (int64_t block = 0; block < N; block += BLOCK) {
            const int64_t end = block + BLOCK < N ? block + BLOCK : N;
            memset(sum, 0, sizeof(sum));
            for (int64_t n = block; n < end; n += 4) {
                memset(wide, 0, sizeof(wide));
                for (int64_t k = 0; k < 4 && n + k < end; k++)
                    for (int64_t i = 0; i < many; i++) wide[k][i] = FLOAT(x[(n + k) * D + start + i]);
                for (int64_t e = 0; e < E; e++) {
                    float by[4], *to = sum + e * STRIP;
                    for (int64_t k = 0; k < 4; k++) by[k] = n + k < end ? dlogit[(n + k) * E + e] : 0.0f;
                    for (int64_t i = 0; i < STRIP; i++)
                        to[i] += by[0] * wide[0][i] + by[1] * wide[1][i] + by[2] * wide[2][i] + by[3] * wide[3][i];
                }
            }
            for (int64_t e = 0; e < E; e++)
                for (int64_t i = 0; i < many; i++) dw[e * D + start + i] += sum[e * STRIP + i];
        }
    }
}
