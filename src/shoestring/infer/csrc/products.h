/* Products for one dtype T: tiles of 16 outputs, sums in fp32, the same order whatever the number of rows. */

INLINE VECTOR NAME(rest)(const T *p, int64_t count) {
#ifdef PAIRED
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
#else
    T padded[WIDE] __attribute__((aligned(64))) = {0};
    memcpy(padded, p, count * sizeof(T));
    return LOAD(padded);
#endif
}

/* Row pointers times weight rows: RT x OT = 16 sums over `in`, row by row. */
INLINE void NAME(block)(int RT, int OT, const T *const *x, const T *const *w, int64_t in, int64_t ahead, float *out) {
    v16 acc[16];
    UNROLL for (int i = 0; i < 16; i++) acc[i] = (v16){0};
    UNROLL for (int o4 = 0; o4 < OT; o4 += 4) { /* four rows of weights at a time, so that memory is read in order */
        int64_t k = 0;
        for (; k + WIDE <= in; k += WIDE) {
            VECTOR a[4];
            UNROLL for (int r = 0; r < RT; r++) a[r] = LOAD(x[r] + k);
            UNROLL for (int o = o4; o < o4 + 4; o++) {
                const VECTOR b = LOAD(w[o] + k);
                if (ahead) __builtin_prefetch(w[o] + k + ahead, 0, 2);
                UNROLL for (int r = 0; r < RT; r++) acc[r * OT + o] = DOT(acc[r * OT + o], a[r], b);
            }
        }
        if (k == in) continue;
        VECTOR a[4]; /* what is left, with zeros behind it */
        UNROLL for (int r = 0; r < RT; r++) a[r] = NAME(rest)(x[r] + k, in - k);
        UNROLL for (int o = o4; o < o4 + 4; o++) {
            const VECTOR b = NAME(rest)(w[o] + k, in - k);
            UNROLL for (int r = 0; r < RT; r++) acc[r * OT + o] = DOT(acc[r * OT + o], a[r], b);
        }
    }
    UNROLL for (int i = 0; i < 8; i++) acc[i] = pairs(acc[2 * i], acc[2 * i + 1]);
    UNROLL for (int i = 0; i < 4; i++) acc[i] = pairs(acc[2 * i], acc[2 * i + 1]);
    *(v16u *)out = pairs(pairs(acc[0], acc[1]), pairs(acc[2], acc[3]));
}

static NOINLINE void NAME(block1)(const T *const *x, const T *const *w, int64_t in, int64_t ahead, float *out) {
    NAME(block)(1, 16, x, w, in, ahead, out);
}
static NOINLINE void NAME(block2)(const T *const *x, const T *const *w, int64_t in, int64_t ahead, float *out) {
    NAME(block)(2, 8, x, w, in, ahead, out);
}
static NOINLINE void NAME(block4)(const T *const *x, const T *const *w, int64_t in, int64_t ahead, float *out) {
    NAME(block)(4, 4, x, w, in, ahead, out);
}

/* n <= ROWS rows times up to OUTS rows of w that are `stride` apart: out [n, OUTS]. What lies `ahead` is fetched,
   a quarter at a time spread over the rows: in one burst it would wait for memory. */
static void NAME(tile)(const T *const *x, int64_t n, const T *w, int64_t stride, int64_t outs, int64_t in,
                       int64_t ahead, float *out) {
    const T *rows[OUTS];
    float sum[16];
    for (int64_t o = 0; o < OUTS; o++) rows[o] = w + (o < outs ? o : outs - 1) * stride;
    int64_t r = 0;
    for (; r + 3 <= n; r += 4) { /* three rows are four with the last one twice: one pass over the weights, not two */
        const int many = n - r < 4 ? 3 : 4;
        const T *const four[4] = {x[r], x[r + 1], x[r + 2], x[r + many - 1]};
        for (int o = 0; o < OUTS; o += 4) {
            if (o >= outs) break;
            NAME(block4)(four, rows + o, in, n / 4 * (o / 4) / 4 == r / 4 ? ahead : 0, sum);
            for (int i = 0; i < many; i++) memcpy(out + (r + i) * OUTS + o, sum + 4 * i, 16);
        }
    }
    for (; r + 2 <= n; r += 2)
        for (int o = 0; o < OUTS; o += 8) {
            if (o >= outs) break;
            NAME(block2)(x + r, rows + o, in, r ? 0 : ahead, sum);
            for (int i = 0; i < 2; i++) memcpy(out + (r + i) * OUTS + o, sum + 8 * i, 32);
        }
    if (r < n) NAME(block1)(x + r, rows, in, r ? 0 : ahead, out + r * OUTS);
}

/* n rows times rows [at, at + outs) of a matrix; the next tile is fetched meanwhile. int8 becomes T, which holds it
   exactly, a tile at a time; its scales are applied to the sums. */
static void NAME(multiply)(const T *const *x, int64_t n, Matrix w, int64_t at, int64_t outs, float *out) {
    if (!w.scale) {
        NAME(tile)(x, n, (const T *)w.weight + at * w.in, w.in, outs, w.in, OUTS * w.in, out);
        return;
    }
    T wide[OUTS * w.in] __attribute__((aligned(64)));
    const int8_t *from = (const int8_t *)w.weight + at * w.in;
    const int64_t count = outs * w.in;
    int64_t i = 0;
#ifdef PAIRED
    for (; i + 32 <= count; i += 32) {
        if (i % 64 == 0) __builtin_prefetch(from + OUTS * w.in + i, 0, 2);
        const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(from + i))));
        const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(from + i + 16))));
        _mm512_storeu_si512(wide + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
#endif
    for (; i < count; i++) wide[i] = ROUND((float)from[i]);
    NAME(tile)(x, n, wide, w.in, outs, w.in, 0, out);
    for (int64_t r = 0; r < n; r++)
        for (int64_t o = 0; o < outs; o++) out[r * OUTS + o] *= w.scale[at + o];
}

/* rows [row, row + out) of a matrix, as a matrix */
INLINE Matrix NAME(part)(Matrix w, int64_t row, int64_t out) {
    const int64_t size = w.scale ? 1 : sizeof(T);
    return (Matrix){(const char *)w.weight + row * w.in * size, 0, w.scale ? w.scale + row : 0, out, w.in};
}

INLINE float NAME(bias)(Matrix w, int64_t o) { return w.bias ? FLOAT(((const T *)w.bias)[o]) : 0.0f; }

/* Thread t's share of x Wᵀ + b: into `y` (fp32) or `z` (rounded), or added to `sum`; whichever is not null. */
static void NAME(product)(int t, int n, const T *x, int64_t ldx, int64_t R, Matrix w, float *y, T *z, float *sum,
                          int64_t ldy) {
    const int64_t end = low(w.out, OUTS, t + 1, n);
    float out[ROWS * OUTS];
    const T *rows[ROWS];
    for (int64_t at = low(w.out, OUTS, t, n); at < end; at += OUTS)
        for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
            const int64_t many = R - r0 < ROWS ? R - r0 : ROWS, outs = w.out - at < OUTS ? w.out - at : OUTS;
            for (int64_t r = 0; r < many; r++) rows[r] = x + (r0 + r) * ldx;
            NAME(multiply)(rows, many, w, at, outs, out);
            for (int64_t r = 0; r < many; r++)
                for (int64_t o = 0; o < outs; o++) {
                    const float s = out[r * OUTS + o] + NAME(bias)(w, at + o);
                    const int64_t place = (r0 + r) * ldy + at + o;
                    if (y) y[place] = s;
                    else if (z) z[place] = ROUND(s);
                    else sum[place] += s;
                }
        }
}

/* A product for each head: x [R, H, in] with W [H, out, in] into z[R, H, :out]. */
static void NAME(heads)(int t, int n, const T *x, int64_t ldx, int64_t step_x, int64_t R, int64_t H, Matrix w, T *z,
                        int64_t ldz, int64_t step_z) {
    const int64_t tiles = (w.out + OUTS - 1) / OUTS, end = low(H * tiles, 1, t + 1, n);
    float out[ROWS * OUTS];
    const T *rows[ROWS];
    for (int64_t i = low(H * tiles, 1, t, n); i < end; i++) {
        const int64_t h = i / tiles, at = i % tiles * OUTS, outs = w.out - at < OUTS ? w.out - at : OUTS;
        for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
            const int64_t many = R - r0 < ROWS ? R - r0 : ROWS;
            for (int64_t r = 0; r < many; r++) rows[r] = x + (r0 + r) * ldx + h * step_x;
            NAME(multiply)(rows, many, w, h * w.out + at, outs, out);
            for (int64_t r = 0; r < many; r++)
                for (int64_t o = 0; o < outs; o++) z[(r0 + r) * ldz + h * step_z + at + o] = ROUND(out[r * OUTS + o]);
        }
    }
}
