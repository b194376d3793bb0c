/* Numbers of the two dtypes, and the functions that every file here needs. Plain C, so that the compiler's vectoriser
   takes whatever the processor has. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SMALL 16384 /* elements: fewer are not worth a second thread */

typedef uint16_t bf16;

INLINE float wide_f32(float x) { return x; }
INLINE float round_f32(float x) { return x; }

INLINE float wide_bf16(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE bf16 round_bf16(float x) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : (bf16)rounded;
}

INLINE float exp1(float x) { /* to 2e-7 relative; NaN stays NaN; 0 below -87 */
    const float clipped = x > 88.0f ? 88.0f : x;
    const float n = __builtin_rintf(clipped * 1.44269504088896341f);
    const float r = clipped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = ((int32_t)(n < -126.0f ? -126.0f : n) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

INLINE float sigmoid1(float x) { return 1.0f / (1.0f + exp1(-x)); }
