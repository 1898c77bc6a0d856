/* The forward of a decoder for few rows in float32 on a CPU, by weights and keys of float32 or
 * bfloat16: products, attention, norms, rotations, gated activations; and the best children of a
 * beam.
 *
 * Two aims. Few rows multiply matrices that lie in no cache, so memory decides: a row more should
 * cost nothing until arithmetic takes as long as reading does. And a row's numbers depend on no
 * other row, bit for bit: every sum goes over k = 0, 1, ... in that order, whatever other rows there
 * are, however many, on however many threads, and masked keys between, whose values are finite, add
 * exact zeros.
 *
 * One unit of several files, in the order in which they use each other: attention inlines products.
 * Source: ours, but for what the files name.
 */
#include "vectors.h"
#include "products.c"
#include "attention.c"
#include "rows.c"
#include "layers.c"
#include "beams.c"

long panel_width(void) { return PANEL; }

/* Whether this processor multiplies bfloat16 in pairs. */
int has_pairs(void) { return HAS_PAIRS; }

int has_threads(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
