/* Products for one dtype T whose right side lies packed in words: c = a b, sums in fp32, in one order always.

   A word is a float, or where the machine multiplies bf16 by itself (PAIRED) two of them that are neighbours along the
   summed side. a [rows, n words] is read where it lies, a word at a time for all columns; b is [n, ldb] words, a column
   a lane; c is fp32 [rows, ldc]. */

/* what c holds before: nothing of use, sums to be added to, or sums to be scaled column by column and added to */
#ifndef FRESH
#define FRESH 0
#define ADD 1
#define RESCALE 2
#endif

INLINE void NAME(tile)(int R, int C, const char *a, int64_t lda, const float *b, int64_t ldb, int64_t n, float *c,
                       int64_t ldc, int mode, const float *factor) {
    vf acc[8][4]; /* not of size R, C: an array whose size is no literal stays in memory */
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int i = 0; i < C; i++) {
            acc[r][i] = mode == FRESH ? (vf){0} : *(const vfu *)(c + r * ldc + i * LANES);
            if (mode == RESCALE) acc[r][i] *= *(const vfu *)(factor + i * LANES);
        }
    for (int64_t k = 0; k < n; k++) {
        vf right[4];
        UNROLL for (int i = 0; i < C; i++) right[i] = *(const vfu *)(b + k * ldb + i * LANES);
        UNROLL for (int r = 0; r < R; r++) {
            const vf left = same(*(const word *)(a + r * lda + 4 * k));
            UNROLL for (int i = 0; i < C; i++) acc[r][i] = DOT(acc[r][i], left, right[i]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int i = 0; i < C; i++) *(vfu *)(c + r * ldc + i * LANES) = acc[r][i];
}

#define SIZED(R, C)                                                                                                   \
    static NOINLINE void NAME(tile##R##C)(const char *a, int64_t lda, const float *b, int64_t ldb, int64_t n,         \
                                          float *c, int64_t ldc, int mode, const float *factor) {                     \
        NAME(tile)(R, C, a, lda, b, ldb, n, c, ldc, mode, factor);                                                    \
    }
#define SIZES(R) SIZED(R, 1) SIZED(R, 2) SIZED(R, 3) SIZED(R, 4)
SIZES(1) SIZES(2) SIZES(4) SIZED(8, 1) SIZED(8, 2) SIZED(8, 3)
#undef SIZES
#undef SIZED

typedef void (*NAME(Tile))(const char *, int64_t, const float *, int64_t, int64_t, float *, int64_t, int,
                           const float *);

/* `columns` is a multiple of LANES; `factor` belongs to the columns */
static void NAME(product)(const char *a, int64_t lda, const float *b, int64_t ldb, int64_t n, int64_t rows,
                          int64_t columns, float *c, int64_t ldc, int mode, const float *factor) {
    static const NAME(Tile) tiles[4][4] = {
        {NAME(tile11), NAME(tile12), NAME(tile13), NAME(tile14)},
        {NAME(tile21), NAME(tile22), NAME(tile23), NAME(tile24)},
        {NAME(tile41), NAME(tile42), NAME(tile43), NAME(tile44)},
        {NAME(tile81), NAME(tile82), NAME(tile83), 0},
    };
    for (int64_t at = 0, many; at < columns; at += many * LANES) {
        const int64_t left = (columns - at) / LANES;
        many = left <= MOST ? left : left < 2 * MOST ? (left + 1) / 2 : MOST; /* 5 columns are 3 and 2, not 4 and 1 */
        for (int64_t r = 0; r < rows;) {
            const int64_t rest = rows - r;
            const int deep = DEEP && many < 4 && rest >= 8 ? 3 : rest >= 4 ? 2 : rest >= 2 ? 1 : 0;
            tiles[deep][many - 1](a + r * lda, lda, b + at, ldb, n, c + r * ldc + at, ldc, mode,
                                  factor ? factor + at : 0);
            r += 1 << deep;
        }
    }
}
