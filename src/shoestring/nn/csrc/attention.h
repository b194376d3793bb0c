/* Attention of one head for one dtype NUMBER: what is packed, the forward, the backward. */

typedef struct {
    const char *k, *v;      /* rows of words: where they lie, or widened */
    int64_t k_apart, v_apart;
    float *rows;            /* room to widen rows */
    float *across;          /* [blocks of keys, W or K, BLOCK] numbers: v (forward) or k (backward), keys along rows */
    float *q, *dout;        /* [words of K or W, BLOCK]: turned */
    float *q_rows, *dout_rows; /* [BLOCK / UNIT, K or W to LANES]: neighbours along t in a word */
    float *s, *dp;          /* [BLOCK, BLOCK] scores (forward), or [4, BLOCK] */
    float *p, *ds;          /* backward: [keys, queries] of NUMBER, neighbours along t in a word */
    float *p_keys;          /* [keys / UNIT, queries] words: p (forward) or ds (backward), neighbours along s in a word */
    float *sum;             /* [W or K, BLOCK]: o (forward) or dq (backward), turned */
    float *top, *total, *factor; /* [BLOCK]: L and D in the backward */
    float *dk, *dv;         /* [T, K or W to LANES] */
} NAME(Work);

INLINE int64_t NAME(words)(int64_t width) { return (width + UNIT - 1) / UNIT; }

/* Places of the parts from `at` on; returns where they end. */
static char *NAME(divide)(const Attention *x, int backward, char *at, NAME(Work) *w) {
#define TAKE(part, count) w->part = (float *)at, at += up(4 * (count), 64)
    const int64_t T = x->T, K = x->K, W = x->W, blocks = up(T, BLOCK) / BLOCK, kw = NAME(words)(K), vw = NAME(words)(W);
    const int64_t kp = up(K, LANES), vp = up(W, LANES);
    TAKE(rows, T * (kw + vw));
    TAKE(across, blocks * BLOCK * (backward ? K : W));
    TAKE(q, kw * BLOCK);
    TAKE(p_keys, BLOCK * BLOCK);
    TAKE(sum, (backward ? K : W) * BLOCK);
    TAKE(top, BLOCK);
    TAKE(total, BLOCK);
    TAKE(factor, BLOCK);
    TAKE(s, BLOCK * BLOCK);
    if (!backward) return at;
    TAKE(dout, vw * BLOCK);
    TAKE(q_rows, BLOCK * kp);
    TAKE(dout_rows, BLOCK * vp);
    TAKE(dp, 4 * BLOCK);
    TAKE(p, BLOCK * BLOCK);
    TAKE(ds, BLOCK * BLOCK);
    TAKE(dk, T * kp);
    TAKE(dv, T * vp);
#undef TAKE
    return at;
}

/* ---- packing */
/* word i of a row, with 0 behind its end */
INLINE float NAME(word)(const char *at, int64_t i, int64_t width) {
    const NUMBER *numbers = (const NUMBER *)at;
#if UNIT == 2
    const uint32_t pair = numbers[2 * i] | (2 * i + 1 < width ? (uint32_t)numbers[2 * i + 1] << 16 : 0);
    float both;
    memcpy(&both, &pair, 4);
    return both;
#else
    (void)width;
    return FLOAT(numbers[i]);
#endif
}

#if defined(WIDE) && DIRECT
#if UNIT == 2
#define LOAD_WORDS(p, numbers) (vf) _mm512_maskz_loadu_epi16((numbers) < 32 ? (1u << (numbers)) - 1 : ~0u, p)
#define STORE_WORDS(p, numbers, x) _mm512_mask_storeu_epi16(p, (numbers) < 32 ? (1u << (numbers)) - 1 : ~0u, (__m512i)(x))
/* a's numbers, then b's, rounded */
INLINE __m512i join(vf a, vf b) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
/* neighbours of a joined pair in words */
INLINE vf mingle(__m512i x) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vf)_mm512_permutexvar_epi16(order, x);
}
#else
#define LOAD_WORDS(p, numbers) (vf) _mm512_maskz_loadu_ps((numbers) < 16 ? (1u << (numbers)) - 1 : ~0u, p)
#define STORE_WORDS(p, numbers, x) _mm512_mask_storeu_ps(p, (numbers) < 16 ? (1u << (numbers)) - 1 : ~0u, (__m512)(x))
#endif
#endif

/* [count, width] numbers -> [words, ld] words, 0 in the columns behind `count` up to a whole STEP */
static void NAME(turned)(const char *at, int64_t apart, int64_t count, int64_t width, float *to, int64_t ld) {
    const int64_t words = NAME(words)(width);
#ifdef LOAD_WORDS
    int64_t whole = 0;
    if (words >= 16 && width == UNIT * words) /* whole squares, the last over its neighbour */
        for (; whole + 16 <= count; whole += 16)
            for (int64_t i = 0;; i = least(i + 16, words - 16)) {
                vf r[16];
                UNROLL for (int j = 0; j < 16; j++) r[j] = *(const vfu *)(at + (whole + j) * apart + 4 * i);
                turn16(r);
                UNROLL for (int j = 0; j < 16; j++) *(vfu *)(to + (i + j) * ld + whole) = r[j];
                if (i == words - 16) break;
            }
    for (int64_t t = whole; t < count; t += 16)
        for (int64_t i = 0; i < words; i += 16) {
            vf r[16];
            UNROLL for (int j = 0; j < 16; j++) r[j] =
                t + j < count ? LOAD_WORDS(at + (t + j) * apart + 4 * i, width - UNIT * i) : (vf){0};
            turn16(r);
            UNROLL for (int j = 0; j < 16; j++) if (i + j < words) *(vfu *)(to + (i + j) * ld + t) = r[j];
        }
#else
    for (int64_t i = 0; i < words; i++)
        for (int64_t t = 0; t < up(count, STEP); t++)
            to[i * ld + t] = t < count ? NAME(word)(at + t * apart, i, width) : 0.0f;
#endif
}

/* keys [T, width] -> [blocks, width, BLOCK] numbers: a product's left side that is summed over keys */
static void NAME(lay)(const char *at, int64_t apart, int64_t T, int64_t width, float *to) {
    for (int64_t s = 0; s < T; s += BLOCK, to += width * BLOCK / UNIT) {
        const int64_t count = least(BLOCK, T - s);
#if UNIT == 2
        uint32_t turned[NAME(words)(width) * BLOCK];
        NAME(turned)(at + s * apart, apart, count, width, (float *)turned, BLOCK);
        for (int64_t i = 0; i < width; i++) {
            NUMBER *row = (NUMBER *)to + i * BLOCK;
            const uint32_t *from = turned + i / 2 * BLOCK;
            if (i % 2)
                for (int64_t t = 0; t < BLOCK; t++) row[t] = from[t] >> 16;
            else
                for (int64_t t = 0; t < BLOCK; t++) row[t] = from[t];
        }
#else
        NAME(turned)(at + s * apart, apart, count, width, to, BLOCK);
#endif
    }
}

/* [count, width] numbers -> [STEPs of count / UNIT, ld] words with neighbouring rows together, 0 around */
static void NAME(stacked)(const char *at, int64_t apart, int64_t count, int64_t width, float *to, int64_t ld) {
    for (int64_t t = 0; t < up(count, STEP); t += UNIT, to += ld) {
        const NUMBER *a = (const NUMBER *)(at + t * apart);
        if (t + UNIT > count || width < ld) memset(to, 0, ld * 4);
        if (t >= count) continue;
#if UNIT == 2
        uint32_t *pairs = (uint32_t *)to;
        if (t + 1 < count) {
            const NUMBER *b = (const NUMBER *)(at + (t + 1) * apart);
            for (int64_t i = 0; i < width; i++) pairs[i] = a[i] | (uint32_t)b[i] << 16;
        } else
            for (int64_t i = 0; i < width; i++) pairs[i] = a[i];
#else
        for (int64_t i = 0; i < width; i++) to[i] = FLOAT(a[i]);
#endif
    }
}

/* keys or values as rows of words: where they lie, or widened into `room` */
static const char *NAME(rows)(const char *at, int64_t *apart, int64_t T, int64_t width, float *room) {
    if (DIRECT && width % UNIT == 0) return at;
    const int64_t words = NAME(words)(width);
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < words; i++) room[t * words + i] = NAME(word)(at + t * *apart, i, width);
    *apart = 4 * words;
    return (const char *)room;
}

/* sums [width, BLOCK] times a factor of each column -> rows of numbers */
static void NAME(put)(const float *sum, const float *factor, int64_t count, int64_t width, char *at, int64_t apart) {
#ifdef LOAD_WORDS
    for (int64_t t = 0; t < count; t += 16)
        for (int64_t i = 0; i < width; i += 16 * UNIT) {
            vf r[16];
            const vf by = *(const vfu *)(factor + t);
            UNROLL for (int j = 0; j < 16; j++) {
                const int64_t first = i + UNIT * j;
                r[j] = first < width ? by * *(const vfu *)(sum + first * BLOCK + t) : (vf){0};
#if UNIT == 2
                r[j] = mingle(join(r[j], first + 1 < width ? by * *(const vfu *)(sum + (first + 1) * BLOCK + t) : (vf){0}));
#endif
            }
            turn16(r);
            UNROLL for (int j = 0; j < 16; j++) if (t + j < count)
                STORE_WORDS(at + (t + j) * apart + i * sizeof(NUMBER), width - i, r[j]);
        }
#else
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < width; i++) ((NUMBER *)(at + t * apart))[i] = ROUND(sum[i * BLOCK + t] * factor[t]);
#endif
}

/* HIDDEN where a query does not see a key: scores [rows, BLOCK] of the keys from `s` on */
static void NAME(mask)(const Attention *x, int64_t b, int64_t t0, int64_t s, int64_t rows, Run run, float *score) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = run.left; c < run.right; c += STEP) {
            const uint32_t bits = seers(x, b, t0 + c, s + r);
            if (bits != 0xffff) hide(score + r * BLOCK + c, bits);
        }
}

/* ---- forward */
/* p = 2^(s - m) of a run's keys, into words; m, Σ p, and the factor by which what was summed before shrinks */
static void NAME(soften)(const NAME(Work) *w, int64_t rows, int64_t left, int64_t right, float scale) {
    for (int64_t c = left; c < right; c += LANES) {
        float *s = w->s + c, *to = w->p_keys + c;
        vf highest = *(vfu *)s, sum = {0}, sum2 = {0};
        for (int64_t r = 1; r < rows; r++) highest = larger(highest, *(vfu *)(s + r * BLOCK));
        const vf before = *(vfu *)(w->top + c), top = larger(highest * scale, before);
        for (int64_t r = 0; r < rows; r += UNIT) {
            const vf p = power2(EXACTLY, *(vfu *)(s + r * BLOCK) * scale - top);
#if UNIT == 2
            const vf p2 = r + 1 < rows ? power2(EXACTLY, *(vfu *)(s + (r + 1) * BLOCK) * scale - top) : (vf){0};
            *(vfu *)(to + r / 2 * BLOCK) = mingle(join(p, p2));
            sum2 += p2;
#else
            *(vfu *)(to + r * BLOCK) = p;
#endif
            sum += p;
        }
        const vf factor = power2(1, before - top);
        *(vfu *)(w->top + c) = top;
        *(vfu *)(w->factor + c) = factor;
        *(vfu *)(w->total + c) = *(vfu *)(w->total + c) * factor + (sum + sum2);
    }
}

static void NAME(forward_block)(const Attention *x, int64_t b, int64_t t0, int64_t columns, const NAME(Work) *w) {
    const int64_t end = x->seen ? x->T : least(t0 + BLOCK, x->T), W = x->W, words = NAME(words)(x->K);
    for (int64_t s = 0; s < end;) {
        const Run run = next_run(x, b, t0, columns, s, least(up(s + 1, BLOCK), end));
        const int64_t rows = run.to - run.from, left = run.left, wide = run.right - run.left;
        s = run.to;
        if (wide == 0) continue;
        NAME(product)(w->k + run.from * w->k_apart, w->k_apart, w->q + left, BLOCK, words, rows, wide, w->s + left, BLOCK,
                      FRESH, 0);
        if (run.hidden) NAME(mask)(x, b, t0, run.from, rows, run, w->s);
        NAME(soften)(w, rows, left, run.right, x->scale * 1.4426950408889634f);
        const float *v = w->across + (run.from / BLOCK * W * BLOCK + run.from % BLOCK) / UNIT;
        NAME(product)((const char *)v, 4 * BLOCK / UNIT, w->p_keys + left, BLOCK, NAME(words)(rows), W, wide,
                      w->sum + left, BLOCK, RESCALE, w->factor + left);
    }
}

static void NAME(forward)(const Attention *x, int64_t b, int64_t h, char *work) {
    const int64_t T = x->T, K = x->K, W = x->W, g = h / (x->H / x->G);
    NAME(Work) w;
    NAME(divide)(x, 0, work, &w);
    w.k_apart = x->k.t;
    w.k = NAME(rows)(row(x->k, b, g, 0), &w.k_apart, T, K, w.rows);
    NAME(lay)(row(x->v, b, g, 0), x->v.t, T, W, w.across);
    for (int64_t t0 = 0; t0 < T; t0 += BLOCK) {
        const int64_t count = least(BLOCK, T - t0);
        NAME(turned)(row(x->q, b, h, t0), x->q.t, count, K, w.q, BLOCK);
        fetch(row(x->q, b, h, t0), x->q.t, K * sizeof(NUMBER));
        memset(w.sum, 0, W * BLOCK * 4);
        for (int64_t i = 0; i < BLOCK; i++) w.top[i] = LOWEST, w.total[i] = 0.0f;
        NAME(forward_block)(x, b, t0, up(count, STEP), &w);
        float *top = x->top + (b * x->H + h) * T + t0;
        for (int64_t i = 0; i < count; i++) top[i] = w.top[i] + log2f(w.total[i]);
        for (int64_t i = 0; i < count; i++) w.factor[i] = 1.0f / w.total[i]; /* none seen: NaN, as in the twin */
        NAME(put)(w.sum, w.factor, count, W, row(x->o, b, h, t0), x->o.t);
    }
}

/* ---- backward */
/* p and ds of four keys from scores and dout·v */
INLINE void NAME(differ)(const NAME(Work) *w, int64_t r0, int64_t left, int64_t right, float scale) {
    for (int64_t c = left; c < right; c += LANES) {
        const vf top = *(vfu *)(w->top + c), mean = *(vfu *)(w->total + c);
        vf p[4], ds[4];
        UNROLL for (int r = 0; r < 4; r++) {
            p[r] = power2(EXACTLY, *(vfu *)(w->s + r * BLOCK + c) * scale - top);
            ds[r] = p[r] * (*(vfu *)(w->dp + r * BLOCK + c) - mean);
        }
#if UNIT == 2
        UNROLL for (int r = 0; r < 4; r += 2) {
            const __m512i both = join(p[r], p[r + 1]), differences = join(ds[r], ds[r + 1]);
            NUMBER *to = (NUMBER *)w->p + (r0 + r) * BLOCK + c, *to2 = (NUMBER *)w->ds + (r0 + r) * BLOCK + c;
            _mm256_storeu_si256((void *)to, _mm512_castsi512_si256(both));
            _mm256_storeu_si256((void *)(to + BLOCK), _mm512_extracti64x4_epi64(both, 1));
            _mm256_storeu_si256((void *)to2, _mm512_castsi512_si256(differences));
            _mm256_storeu_si256((void *)(to2 + BLOCK), _mm512_extracti64x4_epi64(differences, 1));
            *(vfu *)(w->p_keys + (r0 + r) / 2 * BLOCK + c) = mingle(differences);
        }
#else
        UNROLL for (int r = 0; r < 4; r++) {
            *(vfu *)(w->p + (r0 + r) * BLOCK + c) = p[r];
            *(vfu *)(w->p_keys + (r0 + r) * BLOCK + c) = ds[r];
        }
#endif
    }
}

static void NAME(backward_run)(const Attention *x, int64_t b, int64_t t0, Run run, const NAME(Work) *w) {
    const int64_t K = x->K, W = x->W, kw = NAME(words)(K), vw = NAME(words)(W), kp = up(K, LANES), vp = up(W, LANES);
    const int64_t rows = run.to - run.from, left = run.left, wide = run.right - run.left, ld = 4 * BLOCK / UNIT;
    for (int64_t r = 0; r < rows; r += 4) {
        const int64_t s = run.from + r, many = least(4, rows - r);
        NAME(product)(w->k + s * w->k_apart, w->k_apart, w->q + left, BLOCK, kw, many, wide, w->s + left, BLOCK, FRESH, 0);
        NAME(product)(w->v + s * w->v_apart, w->v_apart, w->dout + left, BLOCK, vw, many, wide, w->dp + left, BLOCK,
                      FRESH, 0);
        if (run.hidden) NAME(mask)(x, b, t0, s, many, run, w->s);
        for (int64_t i = many * BLOCK; i < 4 * BLOCK; i++) w->s[i] = HIDDEN, w->dp[i] = 0.0f; /* keys behind the last */
        NAME(differ)(w, r, left, run.right, x->scale * 1.4426950408889634f);
    }
    const float *ds = UNIT == 2 ? w->ds : w->p_keys;
    NAME(product)((char *)(w->p + left / UNIT), ld, w->dout_rows + left / UNIT * vp, vp, wide / UNIT, rows, vp,
                  w->dv + run.from * vp, vp, ADD, 0);
    NAME(product)((char *)(ds + left / UNIT), ld, w->q_rows + left / UNIT * kp, kp, wide / UNIT, rows, kp,
                  w->dk + run.from * kp, kp, ADD, 0);
    const float *k = w->across + (run.from / BLOCK * K * BLOCK + run.from % BLOCK) / UNIT;
    NAME(product)((const char *)k, ld, w->p_keys + left, BLOCK, NAME(words)(rows), K, wide, w->sum + left, BLOCK, ADD, 0);
}

/* Σ dout·o of a query, the mean of dout·v under p */
INLINE float NAME(mean)(const char *dout, const char *o, int64_t width) {
    const NUMBER *a = (const NUMBER *)dout, *b = (const NUMBER *)o;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += FLOAT(a[i]) * FLOAT(b[i]);
    return sum;
}

/* one head's dq; dk and dv are added to */
static void NAME(backward_head)(const Attention *x, int64_t b, int64_t h, const NAME(Work) *w) {
    const int64_t T = x->T, K = x->K, W = x->W;
    for (int64_t t0 = 0; t0 < T; t0 += BLOCK) {
        const int64_t count = least(BLOCK, T - t0), columns = up(count, STEP), end = x->seen ? T : t0 + count;
        const char *q = row(x->q, b, h, t0), *dout = row(x->dout, b, h, t0), *o = row(x->o, b, h, t0);
        const float *top = x->top + (b * x->H + h) * T + t0;
        NAME(turned)(q, x->q.t, count, K, w->q, BLOCK);
        NAME(stacked)(q, x->q.t, count, K, w->q_rows, up(K, LANES));
        NAME(turned)(dout, x->dout.t, count, W, w->dout, BLOCK);
        NAME(stacked)(dout, x->dout.t, count, W, w->dout_rows, up(W, LANES));
        for (int64_t i = 0; i < columns; i++) {
            w->top[i] = i < count ? top[i] : 0.0f;
            w->total[i] = i < count ? NAME(mean)(dout + i * x->dout.t, o + i * x->o.t, W) : 0.0f;
            w->factor[i] = x->scale;
        }
        fetch(q, x->q.t, K * sizeof(NUMBER));
        fetch(dout, x->dout.t, W * sizeof(NUMBER));
        fetch(o, x->o.t, W * sizeof(NUMBER));
        memset(w->sum, 0, K * BLOCK * 4);
        for (int64_t s = 0; s < end;) {
            const Run run = next_run(x, b, t0, columns, s, least(up(s + 1, BLOCK), end));
            if (run.right > run.left) NAME(backward_run)(x, b, t0, run, w);
            s = run.to;
        }
        NAME(put)(w->sum, w->factor, count, K, row(x->dq, b, h, t0), x->dq.t);
    }
}

static void NAME(backward)(const Attention *x, int64_t b, int64_t g, char *work) {
    const int64_t T = x->T, K = x->K, W = x->W, kp = up(K, LANES), vp = up(W, LANES), many = x->H / x->G;
    NAME(Work) w;
    NAME(divide)(x, 1, work, &w);
    w.k_apart = x->k.t, w.v_apart = x->v.t;
    w.k = NAME(rows)(row(x->k, b, g, 0), &w.k_apart, T, K, w.rows);
    w.v = NAME(rows)(row(x->v, b, g, 0), &w.v_apart, T, W, w.rows + T * NAME(words)(K));
    NAME(lay)(row(x->k, b, g, 0), x->k.t, T, K, w.across);
    memset(w.dk, 0, T * kp * 4);
    memset(w.dv, 0, T * vp * 4);
    for (int64_t h = g * many; h < (g + 1) * many; h++) NAME(backward_head)(x, b, h, &w);
    for (int64_t t = 0; t < T; t++) {
        NUMBER *dk = (NUMBER *)row(x->dk, b, g, t), *dv = (NUMBER *)row(x->dv, b, g, t);
        for (int64_t i = 0; i < K; i++) dk[i] = ROUND(w.dk[t * kp + i] * x->scale);
        for (int64_t i = 0; i < W; i++) dv[i] = ROUND(w.dv[t * vp + i]);
    }
}

/* ---- all heads */
int64_t NAME(shoestring_attention_work)(const Attention *x, int64_t backward) {
    NAME(Work) w;
    return up(NAME(divide)(x, backward, 0, &w) - (char *)0, 4096) * x->threads + 64;
}

void NAME(shoestring_attention)(const Attention *x, int64_t backward) {
    char *work = (char *)up((int64_t)x->work, 64);
    const int64_t each = (NAME(shoestring_attention_work)(x, backward) - 64) / x->threads;
    const int64_t heads = backward ? x->G : x->H;
#pragma omp parallel for schedule(static) num_threads(x->threads)
    for (int64_t i = 0; i < x->B * heads; i++) {
        char *own = work + omp_get_thread_num() * each;
        if (backward) NAME(backward)(x, i / heads, i % heads, own);
        else NAME(forward)(x, i / heads, i % heads, own);
    }
}

#undef LOAD_WORDS
#undef STORE_WORDS
