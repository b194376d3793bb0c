/* Heads rotated by their position, for one dtype T. cis has `turns` positions and is used again for every so many
   rows; it is R numbers a position, cos and sin of each pair. Pairs are neighbours (interleaved) or halves. */

INLINE void NAME(turn)(const T *x, const float *cis, float sign, int64_t R, int interleaved, T *y) {
    const int64_t half = R / 2;
    if (interleaved)
        for (int64_t i = 0; i < half; i++) {
            const float c = cis[2 * i], s = sign * cis[2 * i + 1], p = FLOAT(x[2 * i]), q = FLOAT(x[2 * i + 1]);
            y[2 * i] = ROUND(p * c - q * s);
            y[2 * i + 1] = ROUND(q * c + p * s);
        }
    else
        for (int64_t i = 0; i < half; i++) {
            const float c = cis[2 * i], s = sign * cis[2 * i + 1], p = FLOAT(x[i]), q = FLOAT(x[i + half]);
            y[i] = ROUND(p * c - q * s);
            y[i + half] = ROUND(q * c + p * s);
        }
}

/* y [N, H, K]: x's heads with their last R numbers turned, or turned back for sign = -1 */
void NAME(rotate)(const T *x, int64_t ldx, const float *cis, int64_t turns, float sign, int64_t N, int64_t H, int64_t K,
                  int64_t R, int64_t interleaved, T *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, N * H * K))
    for (int64_t n = 0; n < N; n++)
        for (int64_t h = 0; h < H; h++) {
            const T *from = x + n * ldx + h * K;
            T *to = y + (n * H + h) * K;
            memcpy(to, from, (K - R) * sizeof(T));
            NAME(turn)(from + K - R, cis + n % turns * R, sign, R, interleaved, to + K - R);
        }
}

/* MLA's keys [N, H, nope + R] from kv [N, H, nope + W] and the rotated key pe [N, R] that all heads share; v [N, H, W]
   is the rest of kv. */
void NAME(mla_keys)(const T *kv, const T *pe, int64_t ldpe, const float *cis, int64_t turns, int64_t N, int64_t H,
                    int64_t nope, int64_t R, int64_t W, int64_t interleaved, T *k, T *v, int threads) {
    const int64_t K = nope + R, X = nope + W;
#pragma omp parallel for schedule(static) num_threads(share(threads, N * H * K))
    for (int64_t n = 0; n < N; n++) {
        T turned[R];
        NAME(turn)(pe + n * ldpe, cis + n % turns * R, 1.0f, R, interleaved, turned);
        for (int64_t h = 0; h < H; h++) {
            memcpy(k + (n * H + h) * K, kv + (n * H + h) * X, nope * sizeof(T));
            memcpy(k + (n * H + h) * K + nope, turned, R * sizeof(T));
            memcpy(v + (n * H + h) * W, kv + (n * H + h) * X + nope, W * sizeof(T));
        }
    }
}

/* the gradients of what mla_keys read; pe's [N, R] is a sum over the heads */
void NAME(mla_keys_backward)(const T *dk, const T *dv, const float *cis, int64_t turns, int64_t N, int64_t H,
                             int64_t nope, int64_t R, int64_t W, int64_t interleaved, T *dkv, T *dpe, int threads) {
    const int64_t K = nope + R, X = nope + W, half = R / 2;
#pragma omp parallel for schedule(static) num_threads(share(threads, N * H * K))
    for (int64_t n = 0; n < N; n++) {
        const float *at = cis + n % turns * R;
        float sum[R];
        memset(sum, 0, sizeof(sum));
        for (int64_t h = 0; h < H; h++) {
            const T *from = dk + (n * H + h) * K;
            T *to = dkv + (n * H + h) * X;
            memcpy(to, from, nope * sizeof(T));
            memcpy(to + nope, dv + (n * H + h) * W, W * sizeof(T));
            for (int64_t i = 0; i < R; i++) sum[i] += FLOAT(from[nope + i]);
        }
        for (int64_t i = 0; i < half; i++) {
            const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
            const float c = at[2 * i], s = -at[2 * i + 1];
            dpe[n * R + a] = ROUND(sum[a] * c - sum[b] * s);
            dpe[n * R + b] = ROUND(sum[b] * c + sum[a] * s);
        }
    }
}
