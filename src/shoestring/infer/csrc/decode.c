/* One decoding step of a whole model: R rows, one new token each, against the paged cache.

   The plain twin is infer/layers.py; this does the same in one call, because at a few rows a step there is a hundred
   small operations a layer and each costs microseconds before it computes. Threads share every phase and meet at a
   barrier behind it. Weights are packed in tiles (products.h), but for those that are too large to be copied; sums are
   fp32, what a product reads is rounded to the model's dtype, as in the twin; the residual stream stays fp32.

   Called by infer/native.py, which knows the same structs. Letters as in the package: R rows, D model width, H heads,
   G groups of keys, C latent width, W width of a cached entry, E experts, A chosen ones, F an expert's width. */

#include "vectors.h" /* of nn/csrc, as the next */
#include "route.h"
#include <omp.h>

typedef float v16 __attribute__((vector_size(64)));
typedef float v16u __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16u __attribute__((vector_size(32), aligned(2)));
typedef uint32_t i16 __attribute__((vector_size(64)));
typedef uint32_t i16u __attribute__((vector_size(64), aligned(2)));

#define ROWS 64 /* rows a tile of outputs is multiplied with before the next tile */
#define OUTS 16 /* outputs of a tile */
#define GROUP 64 /* outputs that are computed together, and the stride of what they are written to */
#define TILE(in) (((in) + PAIR - 1) / PAIR * PAIR * OUTS) /* numbers in a packed tile */
#define SCORES 32768 /* that are computed together: they stay in the second-level cache */
#define TURNS(W) ((W) <= 128 && (W) >= 16 * PAIR && (W) % PAIR == 0) /* keys: then a lane of a score is a position */

typedef struct {
    const void *weight, *bias; /* bias may be null; weight too: no product */
    const float *scale;        /* one for each row of int8 weights; null: the weights have the model's dtype */
    int64_t out, in, packed;   /* packed: as products.h says; else row by row */
} Matrix;

typedef struct {
    const void *norm1, *norm2, *q_norm, *k_norm; /* MLA: of the query's and the keys' latent; else of each head */
    float eps1, eps2, q_eps, k_eps;
    Matrix first[3];                              /* MLA: q_a (or q), kv_a; else q, k, v */
    Matrix q_b, o, gate_proj, up_proj, down_proj; /* the dense block, or the shared expert */
    Matrix uk, uv;                                /* of all heads: [H, C, nope] and [H, v, C]; `out` is a head's */
    void *keys, *values;                          /* this layer's arenas [blocks, G, size, W] */
    Matrix gate;                                  /* fp32; null where the layer has no experts */
    const float *gate_bias;                       /* may be null */
    Matrix gate_up, down;                         /* [E · 2F, D] and [E · D, F] */
} Layer;

typedef struct {
    int64_t layers, D, H, G, latent, C, nope, rope, v, q_lora, interleaved, size; /* not latent: `nope` 0, `v` a head */
    int64_t E, A, F, groups, kept_groups, sigmoid, normalise;
    float scale, route_scale, eps;
    const Layer *layer;
    const void *norm; /* the last one */
} Model;

typedef struct {
    int64_t R, J, longest, threads, kept;
    const int64_t *length; /* [R] positions, the new one included */
    const int32_t *table;  /* [R, J] blocks */
    const float *turn;     /* cos, sin: [positions, rope/2, 2] */
    const void *x;         /* embeddings [R, D] */
    void *hidden;          /* [R, D], after the last norm */
    const int64_t *keep;   /* [kept] ascending: rows whose hidden states are asked for; null: all, and `chosen` too */
    const int64_t *kept_length;
    const int32_t *kept_table; /* theirs */
    int64_t *chosen;       /* [MoE layers, R, A], may be null */
    char *work;            /* as large as shoestring_workspace says */
} Batch;

/* ---- small things */
INLINE int64_t low(int64_t total, int64_t unit, int64_t t, int64_t n) { /* where thread t's share begins */
    int64_t units = (total + unit - 1) / unit, at = units * t / n * unit;
    return at < total ? at : total;
}

INLINE v16 pairs(v16 a, v16 b) { /* neighbours summed: a's eight sums, then b's */
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* ---- fp32 */
#define T float
#define NAME(name) name##_f32
#define SPAN 16
#define VECTOR v16
#define LOAD(p) (*(const v16u *)(p))
#define DOT(acc, a, b) ((acc) + (a) * (b))
#define FLOAT(x) (x)
#define ROUND(x) (x)
#define PAIR 1 /* inputs that one step of a packed product takes */
#define PACKED v16
#define ONE float
#define LOAD_TILE(p) LOAD(p)
#define PICK(p) (*(p))
#define PICK_LAST(p) (*(p))
#define EACH(acc, a, b) ((acc) + (a) * (b))
#define EXACTLY 1 /* 2^x */
INLINE void put_f32(float *p, vf x) { *(vfu *)p = x; }
INLINE v16 beside_f32(const float *p, int64_t apart) { return *(const v16u *)p; }
#include "products.h"
#include "attend.h"
#include "step.h"

/* ---- bf16 */
INLINE v16 widen(const uint16_t *p) { return (v16)(__builtin_convertvector(*(const h16u *)p, i16) << 16); }

#undef T
#undef NAME
#undef SPAN
#undef VECTOR
#undef LOAD
#undef DOT
#undef FLOAT
#undef ROUND
#undef PAIR
#undef PACKED
#undef ONE
#undef LOAD_TILE
#undef PICK
#undef PICK_LAST
#undef EACH
#undef EXACTLY
#define T uint16_t
#define NAME(name) name##_bf16
#define FLOAT(x) wide_bf16(x)
#define ROUND(x) round_bf16(x)
#define PAIR 2
#define EXACTLY 0
INLINE v16 beside_bf16(const uint16_t *p, int64_t apart) { /* in pairs with the row that is so far apart */
    return (v16)__builtin_shufflevector(*(const h16u *)p, *(const h16u *)(p + apart), 0, 16, 1, 17, 2, 18, 3, 19, 4, 20,
                                        5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                        31);
}
typedef uint16_t half __attribute__((vector_size(2 * LANES)));
typedef uint16_t halfu __attribute__((vector_size(2 * LANES), aligned(2)));
INLINE void put_bf16(uint16_t *p, vf x) { /* rounded; not NaN */
    const vi bits = (vi)x;
    *(halfu *)p = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, half);
}
#ifdef __AVX512BF16__
INLINE __m512i both(const uint16_t *p) {
    int32_t two;
    memcpy(&two, p, 4);
    return _mm512_set1_epi32(two);
}
#define PAIRED
#define PACKED __m512i
#define ONE __m512i
#define LOAD_TILE(p) _mm512_loadu_si512(p)
#define PICK(p) both(p)
#define PICK_LAST(p) _mm512_set1_epi32(*(p))
#define EACH(acc, a, b) DOT(acc, a, b)
#define SPAN 32
#define VECTOR __m512i
#define LOAD(p) _mm512_loadu_si512(p)
#define DOT(acc, a, b) (v16) _mm512_dpbf16_ps((__m512)(acc), (__m512bh)(a), (__m512bh)(b))
#else
typedef struct {
    float first, second;
} Two;
#define PACKED i16
#define ONE Two
#define LOAD_TILE(p) (*(const i16u *)(p))
#define PICK(p) ((Two){FLOAT((p)[0]), FLOAT((p)[1])})
#define PICK_LAST(p) ((Two){FLOAT((p)[0]), 0.0f})
#define EACH(acc, a, b) ((acc) + (a).first * (v16)((b) << 16) + (a).second * (v16)((b) & 0xffff0000u))
#define SPAN 16
#define VECTOR v16
#define LOAD(p) widen(p)
#define DOT(acc, a, b) ((acc) + (a) * (b))
#endif
#include "products.h"
#include "attend.h"
#include "step.h"
