/* Divergences of the vocabulary's rows, values and gradients; and a draw from such rows. Each row is read three or four
   times while it lies in a core's cache, and nothing but the gradient is written. Sums are fp32 over strips, fp64 over
   the strips. The plain twins stand in losses/forward_kl.py, losses/reverse_kl.py and infer/sampler.py.

   Letters as in the package: N rows, V vocabulary; z, t logits of student and teacher at the temperature. */

#include "numbers.h"

#define STRIP 2048 /* logits whose sum is fp32 */
#define BLOCK 128  /* tokens among which a draw is made in the end */

INLINE float exp_down(float x) { /* of x <= 0, to 2e-7 relative near 0; NaN stays NaN; e^-87 below -87 */
    const float y = (-87.0f > x ? -87.0f : x) * 1.44269504088896341f;
    const float shifted = y + 12582912.0f; /* 1.5 · 2^23: the nearest integer n stands in the last bits */
    const float f = y - (shifted - 12582912.0f);
    float p = 1.327647013e-3f; /* 2^f on [-1/2, 1/2] */
    p = p * f + 9.675540961e-3f;
    p = p * f + 5.550713092e-2f;
    p = p * f + 2.402212024e-1f;
    p = p * f + 6.931469440e-1f;
    p = p * f + 1.0f;
    uint32_t n, bits;
    memcpy(&n, &shifted, 4);
    memcpy(&bits, &p, 4);
    bits += n << 23;
    memcpy(&p, &bits, 4);
    return p;
}

/* Of a row: largest logits, sums of e^(z - top) and e^(t - top), and the sum of (z - t) times the first (reverse KL) or
   of (t - z) times the second (forward KL), rescaled when a larger logit comes. */
typedef struct {
    double z_top, t_top, z_sum, t_sum, gap;
} Row;
#define UNREAD {-INFINITY, -INFINITY, 0, 0, 0}

INLINE double value_of(const Row *row, int student) { /* Σ q ln(q/p) or Σ p ln(p/q) */
    const double shift = row->t_top + log(row->t_sum) - row->z_top - log(row->z_sum); /* ln Σ e^t - ln Σ e^z */
    return student ? row->gap / row->z_sum + shift : row->gap / row->t_sum - shift;
}

void shoestring_kl_value(const Row *rows, int64_t N, int64_t student, float *value, int threads) {
    (void)threads;
    for (int64_t n = 0; n < N; n++) value[n] = (float)value_of(rows + n, student);
}

#define T float
#define NAME(name) shoestring_##name##_f32
#define FLOAT wide_f32
#define ROUND round_f32
#include "divergence.h"
#undef T
#undef NAME
#undef FLOAT
#undef ROUND

#define T bf16
#define NAME(name) shoestring_##name##_bf16
#define FLOAT wide_bf16
#define ROUND round_bf16
#include "divergence.h"

INLINE float seen(float z, float top, float by) { /* in proportion to the probability; 0 for what is ruled out */
    const float x = (z - top) * by;
    return x < -87.0f ? 0.0f : exp_down(x);
}

/* One token a row: the first whose running sum of probabilities exceeds u times the whole, by blocks and then within
   one; at temperature 0 the first of the likeliest. logp is that of the distribution drawn from (at temperature 0 of
   that at 1); NaN where the row has none. */
void shoestring_draw_f32(const float *logits, const double *u, const float *temperature, int64_t N, int64_t V,
                         int64_t *token, float *logp, int threads) {
    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(N *V < SMALL ? 1 : threads)
    for (int64_t n = 0; n < N; n++) {
        const float *z = logits + n * V, by = temperature[n] ? 1.0f / temperature[n] : 1.0f;
        float top = -INFINITY, sum[blocks];
        double whole = 0;
#pragma omp simd reduction(max : top)
        for (int64_t v = 0; v < V; v++) top = z[v] > top ? z[v] : top;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t end = (b + 1) * BLOCK < V ? (b + 1) * BLOCK : V;
            float s = 0;
#pragma omp simd reduction(+ : s)
            for (int64_t v = b * BLOCK; v < end; v++) s += seen(z[v], top, by);
            sum[b] = s;
            whole += s;
        }
        int64_t b = 0, last = 0, v = 0;
        if (!temperature[n]) {
            while (last < V - 1 && z[last] != top) last++;
            token[n] = last;
            logp[n] = (float)-log(whole);
            continue;
        }
        double left = u[n] * whole;
        for (; b + 1 < blocks && left >= sum[b]; b++) left -= sum[b];
        while (b > 0 && sum[b] == 0.0f) left = sum[--b]; /* by rounding, behind the last that has any */
        const int64_t end = (b + 1) * BLOCK < V ? (b + 1) * BLOCK : V;
        for (last = v = b * BLOCK; v < end; v++) {
            const float p = seen(z[v], top, by);
            if (p > 0.0f) last = v;
            if (p > left) break;
            left -= p;
        }
        token[n] = last;
        logp[n] = (float)((double)((z[last] - top) * by) - log(whole));
    }
}
