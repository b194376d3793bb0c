/* Rows of logits z, t [N, V] of one dtype T: value [N] in nats, and d value / d z in the place of z. */

/* More of a row: V further logits on both sides. */
INLINE void NAME(read)(Row *row, const T *z, const T *t, int64_t V, int student) {
    for (int64_t start = 0; start < V; start += STRIP) {
        const int64_t end = start + STRIP < V ? start + STRIP : V;
        float z_top = (float)row->z_top, t_top = (float)row->t_top, a = 0, b = 0, c = 0;
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
        const double z_by = row->z_sum ? exp(row->z_top - z_top) : 0, t_by = row->t_sum ? exp(row->t_top - t_top) : 0;
        row->z_sum = row->z_sum * z_by + a;
        row->t_sum = row->t_sum * t_by + b;
        row->gap = row->gap * (student ? z_by : t_by) + c;
        row->z_top = z_top;
        row->t_top = t_top;
    }
}

/* Reverse KL, dz = q (z - t - Σ q (z - t)), for the normalisers drop out; forward KL, dz = q - p */
INLINE void NAME(slope)(const Row *row, T *z, const T *t, int64_t V, int student) {
    const float z_top = (float)row->z_top, t_top = (float)row->t_top, mean = (float)(row->gap / row->z_sum);
    const float z_share = (float)(1 / row->z_sum), t_share = (float)(1 / row->t_sum);
    if (student) {
#pragma omp simd
        for (int64_t v = 0; v < V; v++) {
            const float x = FLOAT(z[v]), y = FLOAT(t[v]);
            z[v] = ROUND(exp_down(x - z_top) * z_share * (x - y - mean));
        }
    } else {
#pragma omp simd
        for (int64_t v = 0; v < V; v++)
            z[v] = ROUND(exp_down(FLOAT(z[v]) - z_top) * z_share - exp_down(FLOAT(t[v]) - t_top) * t_share);
    }
}

INLINE void NAME(kl)(T *zs, const T *ts, int64_t N, int64_t V, float *value, int threads, int student) {
#pragma omp parallel for schedule(static) num_threads(N *V < SMALL ? 1 : threads)
    for (int64_t n = 0; n < N; n++) {
        Row row = UNREAD;
        NAME(read)(&row, zs + n * V, ts + n * V, V, student);
        value[n] = (float)value_of(&row, student);
        NAME(slope)(&row, zs + n * V, ts + n * V, V, student);
    }
}

void NAME(reverse_kl)(T *z, const T *t, int64_t N, int64_t V, float *value, int threads) {
    NAME(kl)(z, t, N, V, value, threads, 1);
}

void NAME(forward_kl)(T *z, const T *t, int64_t N, int64_t V, float *value, int threads) {
    NAME(kl)(z, t, N, V, value, threads, 0);
}

/* The same where a row is seen V logits at a time: first all of them read, then all of their slopes. */
void NAME(kl_read)(const T *z, const T *t, int64_t N, int64_t V, int64_t student, Row *rows, int threads) {
#pragma omp parallel for schedule(static) num_threads(N *V < SMALL ? 1 : threads)
    for (int64_t n = 0; n < N; n++) {
        if (student)
            NAME(read)(rows + n, z + n * V, t + n * V, V, 1);
        else
            NAME(read)(rows + n, z + n * V, t + n * V, V, 0);
    }
}

void NAME(kl_slope)(T *z, const T *t, int64_t N, int64_t V, int64_t student, const Row *rows, int threads) {
#pragma omp parallel for schedule(static) num_threads(N *V < SMALL ? 1 : threads)
    for (int64_t n = 0; n < N; n++) NAME(slope)(rows + n, z + n * V, t + n * V, V, student);
}
