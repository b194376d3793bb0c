/* Products for one dtype T: sums in fp32, in the same order whatever the number of rows. */

INLINE VECTOR NAME(rest)(const T *p, int64_t count) {
#ifdef PAIRED
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
#else
    T padded[SPAN] __attribute__((aligned(64))) = {0};
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
        for (; k + SPAN <= in; k += SPAN) {
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

/* n <= ROWS rows times up to OUTS rows of w that are `stride` apart: out [n, GROUP]. What lies `ahead` is fetched,
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
            for (int i = 0; i < many; i++) memcpy(out + (r + i) * GROUP + o, sum + 4 * i, 16);
        }
    }
    for (; r + 2 <= n; r += 2)
        for (int o = 0; o < OUTS; o += 8) {
            if (o >= outs) break;
            NAME(block2)(x + r, rows + o, in, r ? 0 : ahead, sum);
            for (int i = 0; i < 2; i++) memcpy(out + (r + i) * GROUP + o, sum + 8 * i, 32);
        }
    if (r < n) NAME(block1)(x + r, rows, in, r ? 0 : ahead, out + r * GROUP);
}

/* ---- packed weights: tiles of 16 outputs, [tiles, in / PAIR, 16, PAIR], zeros beyond `out` and `in`. A lane is an
   output, so that nothing is summed across lanes, and a tile is read from front to back. */

/* RT rows times OT tiles into out [RT, ldo], or added to it. In the first `lines` steps what is `far` is fetched: a
   line, or OT. */
INLINE void NAME(lanes)(int RT, int OT, const T *const *x, const T *w, int64_t in, int64_t lines, int every,
                        const T *far, int more, float *out, int64_t ldo) {
    const int64_t steps = in / PAIR, tile = TILE(in);
    v16 acc[16];
    UNROLL for (int r = 0; r < RT; r++)
        UNROLL for (int o = 0; o < OT; o++) acc[r * OT + o] = more ? *(v16u *)(out + r * ldo + o * OUTS) : (v16){0};
    int64_t k = 0;
#define STEP(pick)                                                                                                     \
    {                                                                                                                  \
        PACKED b[4];                                                                                                   \
        UNROLL for (int o = 0; o < OT; o++) b[o] = LOAD_TILE(w + o * tile + k * PAIR * OUTS);                          \
        UNROLL for (int r = 0; r < RT; r++) {                                                                          \
            const ONE a = pick(x[r] + k * PAIR);                                                                       \
            UNROLL for (int o = 0; o < OT; o++) acc[r * OT + o] = EACH(acc[r * OT + o], a, b[o]);                      \
        }                                                                                                              \
    }
    if (every)
        for (; k < lines; k++) {
            STEP(PICK)
            UNROLL for (int o = 0; o < OT; o++) __builtin_prefetch((const char *)far + 64 * (OT * k + o), 0, 2);
        }
    else
        for (; k < lines; k++) {
            STEP(PICK)
            __builtin_prefetch((const char *)far + 64 * k, 0, 2);
        }
    for (; k < steps; k++) STEP(PICK)
    if (k * PAIR < in) STEP(PICK_LAST)
#undef STEP
    UNROLL for (int r = 0; r < RT; r++)
        UNROLL for (int o = 0; o < OT; o++) *(v16u *)(out + r * ldo + o * OUTS) = acc[r * OT + o];
}

typedef void (*NAME(Lanes))(const T *const *, const T *, int64_t, int64_t, int, const T *, int, float *, int64_t);
#define SIZED(RT, OT)                                                                                                  \
    static NOINLINE void NAME(lanes##RT##_##OT)(const T *const *x, const T *w, int64_t in, int64_t lines, int every,   \
                                                const T *far, int more, float *out, int64_t ldo) {                     \
        NAME(lanes)(RT, OT, x, w, in, lines, every, far, more, out, ldo);                                              \
    }
SIZED(8, 2) SIZED(8, 1) SIZED(7, 2) SIZED(7, 1) SIZED(6, 2) SIZED(6, 1) SIZED(5, 2) SIZED(5, 1)
SIZED(4, 4) SIZED(4, 2) SIZED(4, 1) SIZED(3, 4) SIZED(3, 2) SIZED(3, 1) SIZED(2, 4) SIZED(2, 2) SIZED(2, 1)
SIZED(1, 4) SIZED(1, 2) SIZED(1, 1)
#undef SIZED
static const NAME(Lanes) NAME(sized)[8][3] = {
    {NAME(lanes1_1), NAME(lanes1_2), NAME(lanes1_4)}, {NAME(lanes2_1), NAME(lanes2_2), NAME(lanes2_4)},
    {NAME(lanes3_1), NAME(lanes3_2), NAME(lanes3_4)}, {NAME(lanes4_1), NAME(lanes4_2), NAME(lanes4_4)},
    {NAME(lanes5_1), NAME(lanes5_2), 0}, {NAME(lanes6_1), NAME(lanes6_2), 0},
    {NAME(lanes7_1), NAME(lanes7_2), 0}, {NAME(lanes8_1), NAME(lanes8_2), 0},
};

/* n rows times up to 4 tiles into out [n, ldo], or added to it: 8 rows at a time, tiles staying in the second-level
   cache; meanwhile, if `fetch`, the tiles behind them are fetched, each 8 rows a part. */
static void NAME(group)(const T *const *x, int64_t n, const T *w, int64_t tiles, int64_t in, int fetch, int more,
                        float *out, int64_t ldo) {
    const int64_t tile = TILE(in), steps = in / PAIR, blocks = n < 5 ? 1 : (n + 3) / 8; /* those that fetch */
    for (int64_t i = 0, r = 0; r < n; i++, r += 8) {
        const int64_t rows = n - r < 8 ? n - r : 8, most = rows > 4 ? 2 : 4;
        for (int64_t o = 0, many; o < tiles; o += many) {
            many = tiles - o >= most ? most : tiles - o >= 2 ? 2 : 1;
            const int every = blocks == 1;
            const int64_t lines = !fetch || i >= blocks ? 0 : every ? steps : many * steps / blocks;
            const T *far = w + (tiles + o) * tile + (every ? 0 : i * lines * 64 / (int64_t)sizeof(T));
            NAME(sized)[rows - 1][many / 2](x + r, w + o * tile, in, lines, every, far, more, out + r * ldo + o * OUTS,
                                            ldo);
        }
    }
}

/* int8 as T, which holds it exactly */
static void NAME(widen)(const int8_t *from, int64_t count, T *wide) {
    int64_t i = 0;
#ifdef PAIRED
    for (; i + 32 <= count; i += 32) {
        if (i % 64 == 0) __builtin_prefetch(from + count + i, 0, 2);
        const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(from + i))));
        const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(from + i + 16))));
        _mm512_storeu_si512(wide + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
#endif
    for (; i < count; i++) wide[i] = ROUND((float)from[i]);
}

/* n rows times rows [at, at + outs) of a matrix, outs <= GROUP, into out [n, GROUP]. int8, which is always packed, is
   widened two tiles at a time; its scales are applied to the sums. */
static void NAME(multiply)(const T *const *x, int64_t n, Matrix w, int64_t at, int64_t outs, float *out) {
    const int64_t tile = w.packed ? TILE(w.in) : OUTS * w.in, tiles = (outs + OUTS - 1) / OUTS;
    const T *from = (const T *)w.weight + at / OUTS * tile;
    if (!w.packed) {
        for (int64_t o = 0; o < outs; o += OUTS, from += tile)
            NAME(tile)(x, n, from, w.in, outs - o < OUTS ? outs - o : OUTS, w.in, tile, out + o);
        return;
    }
    if (!w.scale) {
        NAME(group)(x, n, from, tiles, w.in, 1, 0, out, GROUP);
        return;
    }
    T wide[2 * tile] __attribute__((aligned(64)));
    const int8_t *narrow = (const int8_t *)w.weight + at / OUTS * tile;
    for (int64_t o = 0; o < tiles; o += 2) {
        const int64_t many = tiles - o < 2 ? 1 : 2;
        NAME(widen)(narrow + o * tile, many * tile, wide);
        NAME(group)(x, n, wide, many, w.in, 0, 0, out + o * OUTS, GROUP);
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t o = 0; o < outs; o++) out[r * GROUP + o] *= w.scale[at + o];
}

/* the i-th `out` rows of a matrix, as a matrix; packed ones begin with a tile of their own */
INLINE Matrix NAME(part)(Matrix w, int64_t i, int64_t out) {
    const int64_t size = w.scale ? 1 : sizeof(T);
    const int64_t at = w.packed ? i * ((out + OUTS - 1) / OUTS) * TILE(w.in) : i * out * w.in;
    return (Matrix){(const char *)w.weight + at * size, 0, w.scale ? w.scale + i * out : 0, out, w.in, w.packed};
}

INLINE float NAME(bias)(Matrix w, int64_t o) { return w.bias ? FLOAT(((const T *)w.bias)[o]) : 0.0f; }

/* Thread t's share of x Wᵀ + b: into `y` (fp32) or `z` (rounded), or added to `sum`; whichever is not null. */
static void NAME(product)(int t, int n, const T *x, int64_t ldx, int64_t R, Matrix w, float *y, T *z, float *sum,
                          int64_t ldy) {
    const int64_t end = low(w.out, OUTS, t + 1, n);
    float out[ROWS * GROUP];
    const T *rows[ROWS];
    for (int64_t at = low(w.out, OUTS, t, n); at < end; at += GROUP)
        for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
            const int64_t many = R - r0 < ROWS ? R - r0 : ROWS, outs = end - at < GROUP ? end - at : GROUP;
            for (int64_t r = 0; r < many; r++) rows[r] = x + (r0 + r) * ldx;
            NAME(multiply)(rows, many, w, at, outs, out);
            for (int64_t r = 0; r < many; r++)
                for (int64_t o = 0; o < outs; o++) {
                    const float s = out[r * GROUP + o] + NAME(bias)(w, at + o);
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
    const int64_t groups = (w.out + GROUP - 1) / GROUP, end = low(H * groups, 1, t + 1, n);
    float out[ROWS * GROUP];
    const T *rows[ROWS];
    for (int64_t i = low(H * groups, 1, t, n); i < end; i++) {
        const int64_t h = i / groups, at = i % groups * GROUP, outs = w.out - at < GROUP ? w.out - at : GROUP;
        const Matrix head = NAME(part)(w, h, w.out);
        for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
            const int64_t many = R - r0 < ROWS ? R - r0 : ROWS;
            for (int64_t r = 0; r < many; r++) rows[r] = x + (r0 + r) * ldx + h * step_x;
            NAME(multiply)(rows, many, head, at, outs, out);
            for (int64_t r = 0; r < many; r++)
                for (int64_t o = 0; o < outs; o++) z[(r0 + r) * ldz + h * step_z + at + o] = ROUND(out[r * GROUP + o]);
        }
    }
}
