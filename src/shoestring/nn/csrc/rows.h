/* RMSNorm, SwiGLU, and rows that go to experts and come back, for one dtype T. */

/* y = x̂ ∘ w with x̂ = x r, r = 1 / sqrt(mean(x²) + eps) */
void NAME(norm_forward)(const T *x, int64_t ldx, const float *w, float eps, int64_t N, int64_t D, T *y, float *r,
                        int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, N * D))
    for (int64_t n = 0; n < N; n++) {
        const T *xn = x + n * ldx;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t d = 0; d < D; d++) square += FLOAT(xn[d]) * FLOAT(xn[d]);
        const float rn = r[n] = 1.0f / sqrtf(square / D + eps);
        for (int64_t d = 0; d < D; d++) y[n * D + d] = ROUND(FLOAT(xn[d]) * rn * w[d]);
    }
}

/* dx = r (g - x̂ mean(g x̂)) with g = dy ∘ w; dw = Σ dy ∘ x̂ */
void NAME(norm_backward)(const T *x, int64_t ldx, const float *w, const float *r, const T *dy, int64_t N, int64_t D,
                         T *dx, float *dw, int threads) {
    const int64_t blocks = (N + BLOCK - 1) / BLOCK;
    float *partial = calloc(blocks * D + 1, sizeof(float));
#pragma omp parallel for schedule(static) num_threads(share(threads, N * D))
    for (int64_t b = 0; b < blocks; b++) {
        float *sum = partial + b * D;
        const int64_t end = (b + 1) * BLOCK < N ? (b + 1) * BLOCK : N;
        for (int64_t n = b * BLOCK; n < end; n++) {
            const T *xn = x + n * ldx, *dyn = dy + n * D;
            const float rn = r[n];
            float hat[D], g[D], c = 0;
#pragma omp simd reduction(+ : c)
            for (int64_t d = 0; d < D; d++) {
                const float dyd = FLOAT(dyn[d]);
                hat[d] = FLOAT(xn[d]) * rn;
                g[d] = dyd * w[d];
                sum[d] += dyd * hat[d];
                c += g[d] * hat[d];
            }
            c /= D;
            for (int64_t d = 0; d < D; d++) dx[n * D + d] = ROUND((g[d] - hat[d] * c) * rn);
        }
    }
    for (int64_t d = 0; d < D; d++) dw[d] = 0;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t d = 0; d < D; d++) dw[d] += partial[b * D + d];
    free(partial);
}

/* a = silu(gate) ∘ up for h = [gate | up] */
void NAME(swiglu_forward)(const T *h, int64_t N, int64_t F, T *a, int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, N * F))
    for (int64_t n = 0; n < N; n++) {
        const T *gate = h + n * 2 * F, *up = gate + F;
        T *an = a + n * F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            const float g = FLOAT(gate[f]);
            an[f] = ROUND(g * sigmoid1(g) * FLOAT(up[f]));
        }
    }
}

/* dh of a. With `weight` (an expert's output times its weight) dy is first multiplied by the row's; then `a` gets a
   times the weight, for the gradient of the next matrix, and dweight = Σ dy ∘ a. */
void NAME(swiglu_backward)(const T *dy, const T *h, const float *weight, int64_t N, int64_t F, T *dh, T *a,
                           float *dweight, int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, N * F))
    for (int64_t n = 0; n < N; n++) {
        const T *gate = h + n * 2 * F, *up = gate + F, *dyn = dy + n * F;
        T *dgate = dh + n * 2 * F, *dup = dgate + F;
        const float by = weight ? weight[n] : 1.0f;
        float dot = 0;
        if (weight) {
            T *an = a + n * F;
#pragma omp simd reduction(+ : dot)
            for (int64_t f = 0; f < F; f++) {
                const float g = FLOAT(gate[f]), u = FLOAT(up[f]), d = FLOAT(dyn[f]), s = sigmoid1(g);
                const float silu = g * s, value = silu * u, dw = d * by;
                dgate[f] = ROUND(dw * u * (s + silu * (1.0f - s)));
                dup[f] = ROUND(dw * silu);
                an[f] = ROUND(value * by);
                dot += d * value;
            }
            dweight[n] = dot;
            continue;
        }
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            const float g = FLOAT(gate[f]), u = FLOAT(up[f]), d = FLOAT(dyn[f]), s = sigmoid1(g), silu = g * s;
            dgate[f] = ROUND(d * u * (s + silu * (1.0f - s)));
            dup[f] = ROUND(d * silu);
        }
    }
}

/* y[p] = x[token[p]] */
void NAME(gather)(const T *x, const int64_t *token, int64_t P, int64_t D, T *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, P * D))
    for (int64_t p = 0; p < P; p++) memcpy(y + p * D, x + token[p] * D, D * sizeof(T));
}

/* y[n] = Σ_a weight[n, a] x[place[n, a]]; `weight` may be null (all 1) */
void NAME(combine)(const T *x, const int64_t *place, const float *weight, int64_t N, int64_t A, int64_t D, T *y,
                   int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, N * D))
    for (int64_t n = 0; n < N; n++) {
        float sum[D];
        for (int64_t a = 0; a < A; a++) {
            const T *row = x + place[n * A + a] * D;
            const float by = weight ? weight[n * A + a] : 1.0f;
            if (a == 0)
                for (int64_t d = 0; d < D; d++) sum[d] = by * FLOAT(row[d]);
            else
                for (int64_t d = 0; d < D; d++) sum[d] += by * FLOAT(row[d]);
        }
        for (int64_t d = 0; d < D; d++) y[n * D + d] = ROUND(sum[d]);
    }
}

/* y += x */
void NAME(add_to)(const T *x, int64_t N, float *y, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(share(threads, N))
    for (int64_t n = 0; n < N; n++) y[n] += FLOAT(x[n]);
}
