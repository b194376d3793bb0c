/* Rows of logits z, t [N, V] of one dtype T: value [N] in nats, and d value / d z in the place of z. */

/* Over a row: largest logits, sums of e^(z - top) and e^(t - top), and the sum of (z - t) times the first (student 1)
   or of (t - z) times the second (student 0), strip by strip, rescaled when a larger logit comes. */
typedef struct {
    float z_top, t_top;
    double z_sum, t_sum, gap;
} NAME(Row);

INLINE NAME(Row) NAME(read)(const T *z, const T *t, int64_t V, int student) {
    NAME(Row) row = {-INFINITY, -INFINITY, 0, 0, 0};
    for (int64_t start = 0; start < V; start += STRIP) {
        const int64_t end = start + STRIP < V ? start + STRIP : V;
        float z_top = row.z_top, t_top = row.t_top, a = 0, b = 0, c = 0;
#pragma omp simd reduction(max : z_top, t_top)
        for (int64_t v = start; v < end; v++) {
            const float x = FLOAT(z[v]), y = FLOAT(t[v]);
            z_top = x > z_top ? x : z_top;
            t_top = y > t_top ? y : t_top;
        }
#pragma omp simd reduction(+ : a, b, c)
        for (int64_t v = start; v < end; v++) {
            const float x = FLOAT(z[v]), y = FLOAT(t[v]), e = exp_down(x - z_top), f = exp_down(y - t_top);
            a += e;
            b += f;
            c += student ? e * (x - y) : f * (y - x);
        }
        const double z_by = start ? exp((double)row.z_top - z_top) : 0;
        const double t_by = start ? exp((double)row.t_top - t_top) : 0;
        row.z_sum = row.z_sum * z_by + a;
        row.t_sum = row.t_sum * t_by + b;
        row.gap = row.gap * (student ? z_by : t_by) + c;
        row.z_top = z_top;
        row.t_top = t_top;
    }
    return row;
}

/* ln Σ e^t - ln Σ e^z */
INLINE double NAME(shift)(const NAME(Row) *row) {
    return (double)row->t_top + log(row->t_sum) - (double)row->z_top - log(row->z_sum);
}

/* Σ q ln(q/p); dz = q (z - t - Σ q (z - t)), for the normalisers drop out */
void NAME(reverse_kl)(T *zs, const T *ts, int64_t N, int64_t V, float *value, int threads) {
#pragma omp parallel for schedule(static) num_threads(N *V < SMALL ? 1 : threads)
    for (int64_t n = 0; n < N; n++) {
        T *z = zs + n * V;
        const T *t = ts + n * V;
        const NAME(Row) row = NAME(read)(z, t, V, 1);
        const float top = row.z_top, share = (float)(1 / row.z_sum), mean = (float)(row.gap / row.z_sum);
        value[n] = (float)(row.gap / row.z_sum + NAME(shift)(&row));
#pragma omp simd
        for (int64_t v = 0; v < V; v++) {
            const float x = FLOAT(z[v]), y = FLOAT(t[v]);
            z[v] = ROUND(exp_down(x - top) * share * (x - y - mean));
        }
    }
}

/* Σ p ln(p/q); dz = q - p */
void NAME(forward_kl)(T *zs, const T *ts, int64_t N, int64_t V, float *value, int threads) {
#pragma omp parallel for schedule(static) num_threads(N *V < SMALL ? 1 : threads)
    for (int64_t n = 0; n < N; n++) {
        T *z = zs + n * V;
        const T *t = ts + n * V;
        const NAME(Row) row = NAME(read)(z, t, V, 0);
        const float z_top = row.z_top, t_top = row.t_top;
        const float z_share = (float)(1 / row.z_sum), t_share = (float)(1 / row.t_sum);
        value[n] = (float)(row.gap / row.t_sum - NAME(shift)(&row));
#pragma omp simd
        for (int64_t v = 0; v < V; v++)
            z[v] = ROUND(exp_down(FLOAT(z[v]) - z_top) * z_share - exp_down(FLOAT(t[v]) - t_top) * t_share);
    }
}
