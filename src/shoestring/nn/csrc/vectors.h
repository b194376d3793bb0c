/* Vectors of the machine's own width, for products that the vectoriser does not find by itself; and 2^x of them. */

#include "numbers.h"
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define LANES 16
#define WIDE /* 32 registers of 16 numbers */
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vfu __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float word __attribute__((aligned(1))); /* four bytes as they lie: a float, or two bf16 */

#define UNROLL _Pragma("GCC unroll 16")
#define NOINLINE __attribute__((noinline)) /* inlined, gcc 12 spills accumulators */

INLINE vf same(float x) { return x - (vf){0}; }
INLINE vf where(vi yes, vf a, vf b) { return (vf)((yes & (vi)a) | (~yes & (vi)b)); }
INLINE vf larger(vf a, vf b) { /* b where one of them is NaN */
#ifdef WIDE
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return where(a > b, a, b);
#endif
}

/* 2^x for finite x <= 127, by a polynomial on [-1/2, 1/2] that is least wrong relatively: to 8e-5 (bf16 rounds to
   4e-3), `exactly` to 2e-9 before rounding. Exactly 0 from -150 (-127, where vectors cannot scale) on; NaN stays NaN. */
INLINE vf power2(int exactly, vf x) {
#ifdef WIDE
    const vf n = (vf)_mm512_roundscale_ps((__m512)x, 0), r = x - n;
#else
    x = larger(same(-127.0f), x);
    const vf far = x + 12582912.0f, n = far - 12582912.0f, r = x - n; /* 1.5 · 2^23: the sum is rounded to an integer */
#endif
    vf p;
    if (exactly) {
        p = r * 1.5345811523e-4f + 1.3399931214e-3f;
        p = p * r + 9.6184889589e-3f;
        p = p * r + 5.5503287770e-2f;
        p = p * r + 2.4022646891e-1f;
        p = p * r + 6.9314720574e-1f;
        p = p * r + 1.0f;
    } else {
        p = r * 5.5171664930e-2f + 2.4261112188e-1f;
        p = p * r + 6.9326098622e-1f;
        p = p * r + 9.9992807358e-1f;
    }
#ifdef WIDE
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vf)((((vi)far - (vi)same(12582912.0f)) + 127) << 23);
#endif
}

#ifdef WIDE
/* 16 x 16 words turned, in four rounds that swap blocks of 8, 4, 2 and 1. */
#define SWAP(d, ...)                                                                                                  \
    UNROLL for (int i = 0; i < 16; i++) if (!(i & d)) {                                                               \
        const vf a = r[i], b = r[i + d];                                                                              \
        r[i] = __builtin_shufflevector(a, b, __VA_ARGS__);                                                            \
        r[i + d] = __builtin_shufflevector(a, b, SECOND_##d);                                                         \
    }
#define FIRST_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define SECOND_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define FIRST_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define SECOND_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define FIRST_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define SECOND_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define FIRST_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define SECOND_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
INLINE void turn16(vf *r) {
    SWAP(8, FIRST_8)
    SWAP(4, FIRST_4)
    SWAP(2, FIRST_2)
    SWAP(1, FIRST_1)
}
#endif
