/* Causal softmax attention for training, forward and backward, one head after another and nothing of size T x T.

   The plain twin is attend_plain in nn/attention.py. As in FlashAttention (arXiv 2205.14135) a block of BLOCK queries
   meets blocks of keys; the forward keeps each query's L = log2 Σ 2^s, the backward makes the probabilities again:

       s = q·k · scale · log2 e      p = 2^(s - L)        o = Σ p v
       D = Σ dout·o                  ds = p (dout·v - D)  dv = Σ p dout    dq = scale Σ ds k    dk = scale Σ ds q

   Queries lie along the vectors' lanes: scores are made as K Qᵀ, so that a query's largest score and sum are sums
   over rows, keys and values of a product are read where they lie, and p is stored the way the next product reads it.
   Blocks that a mask hides are left out, in steps of 16 keys and 16 queries. Products multiply the model's dtype (p and
   ds are rounded to it; where bf16 cannot be multiplied it is widened and they are not), all sums are fp32. A head is
   computed by one thread in one order, so that the number of threads changes no bit; a group's dk and dv are summed
   over its heads by one thread too.

   Called by nn/attention_native.py, which knows the same struct. Letters as in the package: B sequences, H heads, G
   groups of keys, T positions, K and W the widths of keys and values. */

#include "vectors.h"
#include <omp.h>

#define BLOCK 64 /* queries, and keys, of a block; a multiple of 16 */
#define STEP 16  /* queries of a mask's entry, and the unit in which columns are left out */
#if defined(WIDE) || defined(__aarch64__)
#define MOST 4 /* vectors of columns in a tile */
#define DEEP 1 /* eight rows where they fit */
#else
#define MOST 2
#define DEEP 0
#endif

typedef struct {
    char *at; /* the numbers of a row lie together */
    int64_t b, h, t; /* how far apart sequences, heads and positions are, in bytes */
} Tensor;

typedef struct {
    int64_t B, H, G, T, K, W, threads;
    float scale;
    const uint16_t *seen; /* [B, T/16, T to 16 + T/16]: for 16 queries and a key, whether each sees it; then for the
                             queries and 16 keys, how they meet. Null: causal */
    Tensor q, k, v, o, dout, dq, dk, dv; /* dk and dv: of the groups */
    float *top;           /* L: [B, H, T] */
    char *work;           /* as large as shoestring_attention_work says */
} Attention;

INLINE int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE char *row(Tensor x, int64_t b, int64_t h, int64_t t) { return x.at + b * x.b + h * x.h + t * x.t; }

/* The rows of the next block, to be there when they are asked for. */
INLINE void fetch(const char *at, int64_t apart, int64_t bytes) {
    for (int64_t t = BLOCK; t < 2 * BLOCK; t++)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + t * apart + i, 0, 2);
}

/* What a mask says of the queries t .. t + 16. */
INLINE const uint16_t *said(const Attention *x, int64_t b, int64_t t) {
    const int64_t steps = up(x->T, STEP) / STEP;
    return x->seen + (b * steps + t / STEP) * (STEP + 1) * steps;
}

/* Which of the queries t .. t + 16 see key s. */
INLINE uint32_t seers(const Attention *x, int64_t b, int64_t t, int64_t s) {
    if (x->seen) return said(x, b, t)[s];
    return s <= t ? 0xffff : s >= t + STEP ? 0 : 0xffff & (0xffffu << (s - t));
}

enum { NOBODY, SOME, EVERYBODY };

/* Who of the queries t .. t + 16 sees which of the keys s .. s + 16: NOBODY any, EVERYBODY all. */
INLINE int meeting(const Attention *x, int64_t b, int64_t t, int64_t s) {
    if (x->seen) return said(x, b, t)[up(x->T, STEP) + s / STEP];
    return s >= t + STEP ? NOBODY : s + STEP <= t + 1 ? EVERYBODY : SOME;
}

#define HIDDEN -1e34f /* a score that nobody sees: finite, since -inf less anything rounded is no number */
#define LOWEST -1e30f /* below all scores, above HIDDEN times a scale */

INLINE void hide(float *score, uint32_t bits) { /* where the bit is 0 */
#ifdef WIDE
    _mm512_storeu_ps(score, _mm512_mask_blend_ps(bits, _mm512_set1_ps(HIDDEN), _mm512_loadu_ps(score)));
#else
    for (int i = 0; i < STEP; i++) score[i] = bits >> i & 1 ? score[i] : HIDDEN;
#endif
}

/* Some keys of a block that the same columns of queries meet. */
typedef struct {
    int64_t from, to;   /* keys */
    int64_t left, right; /* columns of the block, multiples of STEP */
    int hidden;         /* whether some of these queries do not see some of these keys */
} Run;

/* The keys from `s` on, at most to `end`: as many steps as the same columns meet. left == right: none of them. */
static Run next_run(const Attention *x, int64_t b, int64_t t0, int64_t columns, int64_t s, int64_t end) {
    Run run = {s, s, 0, 0, 0};
    if (!x->seen && s < t0) return (Run){s, least(end, t0), 0, columns, 0};
    for (; s < end; s += STEP) {
        Run next = {run.from, least(s + STEP, end), columns, 0, 0};
        int meet[BLOCK / STEP];
        for (int64_t c = 0; c < columns; c += STEP) {
            meet[c / STEP] = meeting(x, b, t0 + c, s);
            if (meet[c / STEP] != NOBODY) next.left = least(next.left, c), next.right = c + STEP;
        }
        if (next.right == 0) next.left = 0;
        for (int64_t c = next.left; c < next.right; c += STEP) next.hidden |= meet[c / STEP] != EVERYBODY;
        if (s > run.from && (next.left != run.left || next.right != run.right || next.hidden != run.hidden)) break;
        run = next;
    }
    return run;
}

/* ---- fp32 */
#define NUMBER float
#define NAME(name) name##_f32
#define UNIT 1  /* numbers in a word */
#define DIRECT 1 /* whether two neighbours, or one number, are a word as they lie */
#define EXACTLY 1
#define DOT(acc, a, b) ((acc) + (a) * (b))
#define FLOAT wide_f32
#define ROUND round_f32
#include "tiles.h"
#include "attention.h"

/* ---- bf16 */
#undef NUMBER
#undef NAME
#undef UNIT
#undef DIRECT
#undef EXACTLY
#undef DOT
#undef FLOAT
#undef ROUND
#define NUMBER bf16
#define NAME(name) name##_bf16
#define EXACTLY 0
#define FLOAT wide_bf16
#define ROUND round_bf16
#if defined(WIDE) && defined(__AVX512BF16__)
#define PAIRED
#define UNIT 2
#define DIRECT 1
#define DOT(acc, a, b) (vf) _mm512_dpbf16_ps((__m512)(acc), (__m512bh)(a), (__m512bh)(b))
#else /* widened to fp32 when packed */
#define UNIT 1
#define DIRECT 0
#define DOT(acc, a, b) ((acc) + (a) * (b))
#endif
#include "tiles.h"
#include "attention.h"

int shoestring_attention_lanes(void) { return LANES; } /* numbers in a vector */

/* What a query sees of itself and before: its own segment, and that of a branch's stem (data/batch.py); `seen` as in
   Attention, of segments [B, T]. */
void shoestring_attention_seen(const int64_t *segments, int64_t branch, int64_t B, int64_t T, int64_t threads,
                               uint16_t *seen) {
    const int64_t steps = up(T, STEP) / STEP, wide = (STEP + 1) * steps;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < steps; i++) {
            const int64_t *segment = segments + b * T, end = least((i + 1) * STEP, T);
            uint16_t *to = seen + (b * steps + i) * wide, *meet = to + STEP * steps;
            memset(to, 0, wide * sizeof *to);
            for (int64_t t = i * STEP; t < end; t++) {
                const int64_t own = segment[t], stem = own < branch ? own : own % branch;
                for (int64_t s = 0; s <= t; s++)
                    to[s] |= (uint16_t)((segment[s] == own) | (segment[s] == stem)) << (t - i * STEP);
            }
            for (int64_t s = 0; s < end; s += STEP) {
                uint32_t any = 0, every = 0xffff;
                for (int64_t j = s; j < least(s + STEP, T); j++) any |= to[j], every &= to[j];
                meet[s / STEP] = !any ? NOBODY : every == 0xffff ? EVERYBODY : SOME;
            }
        }
}
