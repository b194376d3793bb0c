/* Weights in fp32 as the products read them in bf16: [out, in] into tiles [tiles, in / 2, 16, 2], zeros beyond `out` and
   an odd `in`. The plain twin is infer/native.py's `packed`. */

#include "vectors.h"

#define OUTS 16 /* outputs of a tile */

void shoestring_pack_bf16(const float *weight, int64_t out, int64_t in, bf16 *packed, int threads) {
    const int64_t pairs = (in + 1) / 2, tiles = (out + OUTS - 1) / OUTS;
#pragma omp parallel for schedule(static) num_threads(out * in < SMALL ? 1 : threads)
    for (int64_t t = 0; t < tiles; t++) {
        const float *from = weight + t * OUTS * in;
        const int64_t outs = out - t * OUTS < OUTS ? out - t * OUTS : OUTS;
        bf16 *to = packed + t * pairs * OUTS * 2;
        int64_t k = 0;
#ifdef WIDE
        for (; outs == OUTS && k + 16 <= in / 2; k += 16) { /* 16 outputs x 16 pairs, turned */
            bf16 rows[OUTS][32] __attribute__((aligned(64)));
            vf r[OUTS];
            for (int o = 0; o < OUTS; o++)
                for (int i = 0; i < 32; i++) rows[o][i] = round_bf16(from[o * in + 2 * k + i]);
            UNROLL for (int o = 0; o < OUTS; o++) r[o] = *(const vf *)rows[o];
            turn16(r);
            UNROLL for (int i = 0; i < 16; i++) memcpy(to + (k + i) * OUTS * 2, &r[i], 64);
        }
#endif
        for (; k < pairs; k++)
            for (int64_t o = 0; o < OUTS; o++) {
                bf16 *pair = to + (k * OUTS + o) * 2;
                pair[0] = o < outs ? round_bf16(from[o * in + 2 * k]) : 0;
                pair[1] = o < outs && 2 * k + 1 < in ? round_bf16(from[o * in + 2 * k + 1]) : 0;
            }
    }
}
