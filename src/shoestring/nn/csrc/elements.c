/* What a training step does between its products: each function is one pass over its numbers.

   Sums are fp32 and in an order that does not depend on the number of threads: a thread has whole rows, and what is
   summed over rows is summed in blocks of BLOCK rows first. What is written is rounded once. Plain loops, for the
   compiler's vectoriser. The plain twins stand in nn/norm.py, linear.py, rope.py, mla.py, experts.py, moe.py, head.py.

   Called by nn/elements.py. Letters as in the package: N rows, D model width, F an expert's width, H heads of width K,
   V vocabulary, E experts, A chosen ones; ld is the distance of two rows. Arrays without one are dense. */

#include "numbers.h"

#define BLOCK 128 /* rows whose sums are one partial sum */
#define STRIP 64  /* columns whose sums stay in registers */

INLINE int share(int threads, int64_t elements) { return elements < SMALL ? 1 : threads; }

typedef struct { /* of a row of logits: the largest, sums of e = exp(z - top) and of e (z - top), the target's */
    double top, sum, dot, target;
} Seen;

#define T float
#define NAME(name) shoestring_##name##_f32
#define FLOAT wide_f32
#define ROUND round_f32
#include "rows.h"
#include "heads.h"
#include "vocabulary.h"
#include "gate.h"
#undef T
#undef NAME
#undef FLOAT
#undef ROUND

#define T bf16
#define NAME(name) shoestring_##name##_bf16
#define FLOAT wide_bf16
#define ROUND round_bf16
#include "rows.h"
#include "heads.h"
#include "vocabulary.h"
#include "gate.h"

#include "routing.h"
