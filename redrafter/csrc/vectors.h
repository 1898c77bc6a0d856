/* Whole vectors of floats, and what all parts share. Source of exp: Moshier's Cephes. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef WIDTH /* floats of a vector */
#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif
#endif
#define PANEL (2 * WIDTH)
#define MASKED -1e30f /* what a mask adds at least where nothing may be seen: the dtype's minimum */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

INLINE vec larger(vec a, vec b) { /* b where it is not a number */
  const ints keep = a >= b;
  return (vec)(((ints)a & keep) | ((ints)b & ~keep));
}

INLINE float largest(vec a) {
  float best = a[0];
  for (int i = 1; i < WIDTH; i++) best = best >= a[i] ? best : a[i];
  return best;
}

/* Whether one is set, of whole ones. */
INLINE int any_of(ints set) {
  int64_t halves[WIDTH / 2], any = 0;
  memcpy(halves, &set, sizeof set);
  for (int i = 0; i < WIDTH / 2; i++) any |= halves[i];
  return any != 0;
}

INLINE vec exponential(vec x) {
  const vec none = {0}, rounder = none + 12582912.0f; /* 1.5 * 2^23: adding it rounds */
  x = larger(none - 87.0f, x);
  x = none - larger(none - 88.0f, none - x);
  const vec n = (x * 1.44269504f + rounder) - rounder;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = none + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return p * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
}

INLINE vec silu(vec x) { return x / (exponential(-x) + 1.0f); }
