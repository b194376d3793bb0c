/* Products of bf16 numbers with fp32 sums, for processors that multiply pairs of them (AVX512-BF16).

   A word is two neighbours along the summed side. The right side is packed in panels of 32 columns, [steps, 32] words,
   from fp32 or bf16 by rows or across them; the left side is read where it lies, or packed in panels of 8 rows,
   [steps, 8] words. 8 rows x 32 columns are summed in registers over at most DEPTH numbers: then a panel stays in the
   first cache while rows stream past it. Every sum has one order, whoever computes it. */

#include <immintrin.h>
#include <omp.h>

#define WIDTH 32 /* columns of a panel */
#define TALL 8   /* rows of a tile */
#define DEPTH 256
#define BAND 128 /* rows that meet all panels in turn; they stay in the second cache */

INLINE int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts(int64_t n, int64_t most) { return n > most ? (n + most - 1) / most : 1; }
/* where part i of `count` begins, a multiple of `unit` */
INLINE int64_t begin(int64_t n, int64_t unit, int64_t i, int64_t count) {
    return least(n, up((n * i + count - 1) / count, unit));
}

typedef struct { /* [rows, *] numbers, fp32 or bf16, whose rows lie anywhere */
    const char *const *row;
    int64_t rows, columns;
    int wide; /* fp32 */
} Rows;

/* 16 numbers of a row from `at` on as bf16, 0 behind its end */
INLINE __m256i numbers16(Rows x, int64_t row, int64_t at) {
    const int64_t left = row < x.rows ? x.columns - at : 0;
    const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    if (!some) return _mm256_setzero_si256();
    if (x.wide) return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x.row[row] + 4 * at));
    return _mm256_maskz_loadu_epi16(some, x.row[row] + 2 * at);
}

/* rows k and k + 1 as 16 words */
INLINE __m512i zip16(Rows x, int64_t k, int64_t at) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const int whole = !x.wide && k + 1 < x.rows && at + 16 <= x.columns;
    const __m256i a = whole ? _mm256_loadu_si256((const void *)(x.row[k] + 2 * at)) : numbers16(x, k, at);
    const __m256i b = whole ? _mm256_loadu_si256((const void *)(x.row[k + 1] + 2 * at)) : numbers16(x, k + 1, at);
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

/* Some rows at a time, so that both what is read and what is written lies together; the next ones are fetched. */
#define CHUNKS(from, to, at, end)                                                                                     \
    for (int64_t k0 = from; k0 < to; k0 += 16)                                                                        \
        for (int64_t i = at; i < end; i += 32) {                                                                      \
            const int64_t k1 = least(k0 + 16, to);                                                                    \
            for (int64_t k = k0 + 16; k < least(k0 + 32, x.rows); k++)                                                \
                __builtin_prefetch(x.row[k] + (x.wide ? 4 : 2) * i, 0, 2);

/* Panels of the columns [at, end), summed over the rows [from, to) */
static void pack_down(Rows x, int64_t from, int64_t to, int64_t at, int64_t end, char *panels) {
    const int64_t size = (to - from + 1) / 2 * WIDTH * 4;
    CHUNKS(from, to, at, end)
            char *panel = panels + (i - at) / WIDTH * size + (k0 - from) / 2 * WIDTH * 4;
            for (int64_t k = k0; k < k1; k += 2, panel += 128) {
                _mm512_storeu_si512(panel, zip16(x, k, i));
                _mm512_storeu_si512(panel + 64, zip16(x, k, i + 16));
            }
        }
}

/* Panels of 8 of them: the left side of a weight's gradient */
static void pack_left(Rows x, int64_t from, int64_t to, int64_t at, int64_t end, char *panels) {
    const int64_t size = (to - from + 1) / 2 * TALL * 4;
    CHUNKS(from, to, at, end)
            char *panel = panels + (i - at) / TALL * size + (k0 - from) / 2 * TALL * 4;
            for (int64_t k = k0; k < k1; k += 2, panel += 32)
                for (int64_t j = 0; j < 2; j++) {
                    const __m512i words = zip16(x, k, i + 16 * j);
                    _mm256_storeu_si256((void *)(panel + 2 * j * size), _mm512_castsi512_si256(words));
                    _mm256_storeu_si256((void *)(panel + (2 * j + 1) * size), _mm512_extracti64x4_epi64(words, 1));
                }
        }
}
#undef CHUNKS

/* A panel whose columns are the rows [at, at + 32), summed along them */
static void pack_across(Rows x, int64_t at, char *panel) {
    for (int64_t i = 0; i < WIDTH; i += 16)
        for (int64_t k = 0; k < x.columns; k += 32) {
            vf r[16];
            UNROLL for (int o = 0; o < 16; o++)
                r[o] = (vf)_mm512_inserti64x4(_mm512_castsi256_si512(numbers16(x, at + i + o, k)),
                                              numbers16(x, at + i + o, k + 16), 1);
            turn16(r);
            const int64_t words = least(16, (x.columns - k + 1) / 2);
            for (int64_t w = 0; w < words; w++) _mm512_storeu_ps(panel + ((k / 2 + w) * WIDTH + i) * 4, (__m512)r[w]);
        }
}

/* 8 rows, `down` bytes apart, whose words are `along` bytes apart, times the first 16 C columns of a panel */
#define TILE(C, a, down, along, panel, steps)                                                                         \
    for (int64_t k = 0; k < steps; k++) {                                                                             \
        __m512bh right[2];                                                                                            \
        UNROLL for (int i = 0; i < C; i++) right[i] = (__m512bh)_mm512_loadu_ps(panel + k * WIDTH * 4 + 64 * i);      \
        UNROLL for (int r = 0; r < TALL; r++) {                                                                       \
            const __m512bh left = (__m512bh)_mm512_set1_ps(*(const word *)(a + r * (down) + k * (along)));            \
            UNROLL for (int i = 0; i < C; i++) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], left, right[i]);               \
        }                                                                                                             \
    }

/* All but the last of a row's parts: into `sum` [8, 32] */
static NOINLINE void tile_sum(const char *a, int64_t down, const char *panel, int64_t steps, int fresh, float *sum) {
    __m512 acc[TALL][2];
    UNROLL for (int i = 0; i < 2 * TALL; i++)
        acc[i / 2][i % 2] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + 16 * i);
    TILE(2, a, down, 4, panel, steps)
    UNROLL for (int i = 0; i < 2 * TALL; i++) _mm512_storeu_ps(sum + 16 * i, acc[i / 2][i % 2]);
}

/* The last part, rounded into y; `sum` is null where there was no other */
INLINE void round_to(int C, const char *a, int64_t down, const char *panel, int64_t steps, const float *sum, bf16 *y,
                     int64_t ldy, uint32_t lanes) {
    __m512 acc[TALL][2];
    UNROLL for (int r = 0; r < TALL; r++) __builtin_prefetch(y + r * ldy, 1); /* its lines come while we multiply */
    UNROLL for (int i = 0; i < 2 * TALL; i++)
        acc[i / 2][i % 2] = sum ? _mm512_loadu_ps(sum + 16 * i) : _mm512_setzero_ps();
    TILE(C, a, down, 4, panel, steps)
    UNROLL for (int r = 0; r < TALL; r++)
        _mm512_mask_storeu_epi16(y + r * ldy, lanes, (__m512i)_mm512_cvtne2ps_pbh(acc[r][1], acc[r][0]));
}
static NOINLINE void tile_round(const char *a, int64_t down, const char *panel, int64_t steps, const float *sum,
                                bf16 *y, int64_t ldy, uint32_t lanes) {
    round_to(2, a, down, panel, steps, sum, y, ldy, lanes);
}
static NOINLINE void half_round(const char *a, int64_t down, const char *panel, int64_t steps, const float *sum,
                                bf16 *y, int64_t ldy, uint32_t lanes) {
    round_to(1, a, down, panel, steps, sum, y, ldy, lanes);
}

/* Packed left rows: added to, or with `fresh` written over, rows of fp32 from their column `at` on */
INLINE void gradient_to(int C, const char *a, const char *panel, int64_t steps, int fresh, float *const *c, int64_t at,
                        int64_t rows, uint32_t lanes) {
    __m512 acc[TALL][2];
    UNROLL for (int r = 0; r < TALL; r++)
        UNROLL for (int i = 0; i < C; i++) acc[r][i] = fresh || r >= rows ? _mm512_setzero_ps()
                                                           : _mm512_maskz_loadu_ps(lanes >> 16 * i, c[r] + at + 16 * i);
    TILE(C, a, 4, TALL * 4, panel, steps)
    UNROLL for (int r = 0; r < TALL; r++)
        UNROLL for (int i = 0; i < C; i++)
            if (r < rows) _mm512_mask_storeu_ps(c[r] + at + 16 * i, lanes >> 16 * i, acc[r][i]);
}
static NOINLINE void tile_gradient(const char *a, const char *panel, int64_t steps, int fresh, float *const *c,
                                   int64_t at, int64_t rows, uint32_t lanes) {
    gradient_to(2, a, panel, steps, fresh, c, at, rows, lanes);
}
static NOINLINE void half_gradient(const char *a, const char *panel, int64_t steps, int fresh, float *const *c,
                                   int64_t at, int64_t rows, uint32_t lanes) {
    gradient_to(1, a, panel, steps, fresh, c, at, rows, lanes);
}
#undef TILE

INLINE uint32_t lanes(int64_t left) { return left >= WIDTH ? 0xffffffff : (1u << left) - 1; }
INLINE int64_t panel_size(int64_t depth) { return up(depth, 2) / 2 * WIDTH * 4; } /* bytes */

/* y [rows, out] = a b: at least 8 rows `down` bytes apart of `depth` numbers, an even count; b in panels. `sums` has
   room for BAND x out, rounded up to WIDTH. */
static void band(const char *a, int64_t down, int64_t rows, int64_t depth, const char *panels, int64_t out, bf16 *y,
                 int64_t ldy, float *sums) {
    const int64_t count = parts(depth, DEPTH);
    for (int64_t part = 0; part < count; part++) {
        const int64_t from = begin(depth, 2, part, count), steps = (begin(depth, 2, part + 1, count) - from) / 2;
        float *sum = sums;
        for (int64_t at = 0; at < out; at += WIDTH) {
            const char *panel = panels + at / WIDTH * panel_size(depth) + from / 2 * WIDTH * 4;
            for (int64_t r = 0; r < rows; r += TALL, sum += TALL * WIDTH) {
                const int64_t row = least(r, rows - TALL); /* the last tile takes some rows again */
                const char *left = a + row * down + 2 * from;
                if (part + 1 < count) tile_sum(left, down, panel, steps, part == 0, sum);
                else
                    (out - at > 16 ? tile_round : half_round)(left, down, panel, steps, count > 1 ? sum : 0,
                                                              y + row * ldy + at, ldy, lanes(out - at));
            }
        }
    }
}

/* c [out, in] = yᵀ x over their rows (+= with `add`), for columns [top, end) of y and [left, right) of x. `work`: two
   packed blocks */
static void gradient(Rows y, Rows x, int64_t top, int64_t end, int64_t left, int64_t right, int add, float *const *c,
                     char *work) {
    const int64_t count = parts(y.rows, DEPTH), most = up(up(y.rows, 2 * count) / count + 2, 2) / 2;
    char *panels = work + most * up(end - top, 32) * 4;
    for (int64_t part = 0; part < count; part++) {
        const int64_t from = begin(y.rows, 2, part, count), to = begin(y.rows, 2, part + 1, count);
        const int64_t steps = (to - from + 1) / 2;
        pack_left(y, from, to, top, end, work);
        pack_down(x, from, to, left, right, panels);
        for (int64_t at = left; at < right; at += WIDTH)
            for (int64_t o = top; o < end; o += TALL) {
                const char *a = work + (o - top) * steps * 4, *panel = panels + (at - left) * steps * 4;
                for (int64_t r = o + TALL; r < least(o + 2 * TALL, end); r++) { /* the next tile's sums */
                    __builtin_prefetch(c[r] + at, 1);
                    __builtin_prefetch(c[r] + at + 16, 1);
                }
                (right - at > 16 ? tile_gradient : half_gradient)(a, panel, steps, !part && !add, c + o, at, end - o,
                                                                  lanes(right - at));
            }
    }
}
