/* Who goes to which expert (nn/moe.py's Routing, nn/experts.py's Order), fp32. */

#include "route.h"

/* logit [N, E] -> score; chosen [N, A]; weight [N, A]. `bias` may be null; with `replay` `chosen` is given. */
void shoestring_route_forward(const float *logit, const float *bias, int64_t N, int64_t E, int64_t A, int64_t groups,
                              int64_t kept, int64_t sigmoid, int64_t normalise, float scale, int64_t replay,
                              float *score, int64_t *chosen, float *weight, int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, N * E))
    for (int64_t n = 0; n < N; n++) {
        route_row(logit + n * E, bias, E, A, groups, kept, sigmoid, normalise, scale, replay, score + n * E,
                  chosen + n * A, weight + n * A);
    }
}

/* dlogit of the weights, and of the scores where `dscore` is not null */
void shoestring_route_backward(const float *score, const int64_t *chosen, const float *dweight, const float *dscore,
                               int64_t N, int64_t E, int64_t A, int64_t sigmoid, int64_t normalise, float scale,
                               float *dlogit, int threads) {
#pragma omp parallel for schedule(static) num_threads(share(threads, N * E))
    for (int64_t n = 0; n < N; n++) {
        const float *s = score + n * E;
        const int64_t *c = chosen + n * A;
        float *d = dlogit + n * E, total = 1e-20f, dot = 0;
        for (int64_t e = 0; e < E; e++) d[e] = dscore ? dscore[n * E + e] : 0.0f;
        if (dweight) {
            for (int64_t a = 0; a < A; a++) total += s[c[a]], dot += dweight[n * A + a] * s[c[a]];
            for (int64_t a = 0; a < A; a++) {
                const float dw = dweight[n * A + a];
                d[c[a]] += scale * (normalise ? (dw - dot / total) / total : dw);
            }
        }
        if (sigmoid) {
            for (int64_t e = 0; e < E; e++) d[e] *= s[e] * (1.0f - s[e]);
            continue;
        }
        float mean = 0;
        for (int64_t e = 0; e < E; e++) mean += d[e] * s[e];
        for (int64_t e = 0; e < E; e++) d[e] = s[e] * (d[e] - mean);
    }
}

/* The M pairs (token, choice) sorted by expert, each expert's rows filled up to a multiple: nn/experts.py's Order.
   place [M]: the row of each pair; token [P]: of each row, 0 where it is filling; ends [E]. */
void shoestring_order_rows(const int64_t *chosen, int64_t M, int64_t A, int64_t E, int64_t multiple, int64_t *place,
                           int64_t *token, int64_t *ends, int threads) {
    (void)threads; /* 10,000 pairs take 40 us */
    int64_t next[E], end = 0;
    memset(next, 0, sizeof(next));
    for (int64_t m = 0; m < M; m++) next[chosen[m]]++;
    for (int64_t e = 0; e < E; e++) {
        const int64_t rows = (next[e] + multiple - 1) / multiple * multiple;
        for (int64_t p = end + next[e]; p < end + rows; p++) token[p] = 0;
        next[e] = end;
        end += rows;
        ends[e] = end;
    }
    for (int64_t m = 0; m < M; m++) {
        const int64_t p = next[chosen[m]]++;
        place[m] = p;
        token[p] = m / A;
    }
}
