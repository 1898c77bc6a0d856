/* Attention of few queries, by the products of products.c. Source: ours. */

#define QUERIES 64         /* whose scores are kept at once */
#define ONE 1073741824.0f  /* 2^30 */
#define FEW (4096 * WIDTH) /* weights whose halves are summed in 32 bits */

INLINE long whole_panels(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

/* To the nearest bfloat16, ties to even; what is not a number stays so. */
INLINE vec nearest_half(vec x) {
  const bits whole = (bits)x, near = (whole + 0x7fff + (whole >> 16 & 1)) & 0xffff0000u;
  const bits odd = (bits)(x != x);
  return (vec)((whole & odd) | (near & ~odd));
}

/* Scores of one query to weights: masked, exp(score - the largest), of bfloat16 if they are to be
 * `rounded`; returns 1 / their sum, or 0 where nothing may be seen. `keys` of them, filled up to
 * whole panels. Weights are summed as whole numbers of ONE-ths: such a sum does not depend on an
 * order, so it need not go one by one. */
static float weigh(float *scores, const float *mask, long keys, int rounded) {
  const long filled = whole_panels(keys);
  vec best = (vec){0} + 2 * MASKED;
  for (long j = keys; j < filled; j++) scores[j] = 2 * MASKED;
  for (long j = 0; j < keys / WIDTH * WIDTH; j += WIDTH)
    best = larger(best, *(vec *)(scores + j) += *(const vec *)(mask + j));
  for (long j = keys / WIDTH * WIDTH; j < keys; j++) scores[j] += mask[j];
  for (long j = keys / WIDTH * WIDTH; j < filled; j += WIDTH)
    best = larger(best, *(vec *)(scores + j));
  const float top = largest(best);
  int64_t sum = 0;
  for (long from = 0; from < filled; from += FEW) {
    const long end = filled - from < FEW ? filled : from + FEW;
    bits low = {0}, high = {0};
    for (long j = from; j < end; j += WIDTH) {
      const vec s = *(vec *)(scores + j);
      const ints seen = ~(s <= (vec){0} + MASKED); /* what is not a number stays so */
      const vec exact = (vec)((ints)exponential(s - top) & seen);
      const vec weight = rounded ? nearest_half(exact) : exact;
      const bits parts = (bits)__builtin_convertvector(weight * ONE + 0.5f, ints);
      *(vec *)(scores + j) = weight;
      low += parts & 0xffff, high += parts >> 16;
    }
    for (int i = 0; i < WIDTH; i++) sum += low[i] + ((int64_t)high[i] << 16);
  }
  return sum == 0 ? 0 : ONE / (float)sum;
}

struct sizes { /* of one attention; strides in entries */
  long rows, queries, heads, key_heads, dim, keys;
  long q_stride;                           /* from a query to the next, whose heads lie together */
  long k_row, k_head, k_key, v_row, v_head, v_key;
  long mask_row, mask_query;
  float scale;
  int bytes;                               /* of an entry of k and v: floats, or bfloat16 */
};

/* Floats of a value panel's copy, where heads are no whole panels of floats. */
INLINE long copied(const struct sizes *s) {
  return s->dim % PANEL || s->bytes != 4 ? s->keys * PANEL : 0;
}

/* Whether queries and weights are rounded to bfloat16, as keys and values are, and multiplied in
 * pairs. What is masked between two keys still adds nothing: the instruction adds one product after
 * the other, the upper halves' first. */
INLINE int in_pairs(const struct sizes *s) {
  return HAS_PAIRS && s->bytes == 2 && s->dim % 2 == 0;
}

/* The weights of a row, their places exchanged within each pair: the first key's is added first. */
INLINE void pair_weights(float *weights, long keys) {
  bits *const pairs = (bits *)weights;
  pair_up(weights, pairs, keys);
  for (long i = 0; i * PANEL < keys; i++) pairs[i] = pairs[i] << 16 | pairs[i] >> 16;
}

/* n entries of two keys' values, in the same order; second: NULL, there is none */
INLINE void pair_values(float *restrict to, const char *restrict first, const char *restrict second,
                        long n) {
  for (long i = 0; i < n; i++) {
    uint16_t upper, lower = 0;
    memcpy(&upper, first + i * 2, 2);
    if (second) memcpy(&lower, second + i * 2, 2);
    const uint32_t both = (uint32_t)upper << 16 | lower;
    memcpy(to + i, &both, 4);
  }
}

/* n floats from as many entries, each `step` floats behind the one before. */
INLINE void widen(float *restrict to, long step, const char *restrict from, long n, int bytes) {
  if (bytes == 4) {
    for (long i = 0; i < n; i++) memcpy(to + i * step, from + i * 4, 4);
  } else {
    for (long i = 0; i < n; i++) { /* the upper half of a float */
      uint16_t half;
      memcpy(&half, from + i * 2, 2);
      const uint32_t whole = (uint32_t)half << 16;
      memcpy(to + i * step, &whole, 4);
    }
  }
}

struct range { /* of keys */
  long begin, end;
};

/* Whether none of WIDTH keys may be seen. */
INLINE int hidden(const float *mask) {
  return !any_of(~(*(const vec *)mask <= (vec){0} + MASKED));
}

/* The keys between which all lie that any of `queries` may see: before a text's own, and beyond a
 * window, the others weigh 0, and that sums to nothing. */
static struct range visible(const struct sizes *s, const float *mask, long queries) {
  struct range seen = {s->keys, 0};
  for (long i = queries - 1; i >= 0; i--) { /* the last one sees farthest */
    const float *const own = mask + i * s->mask_query;
    long begin = 0, end = s->keys;
    while (end - WIDTH >= seen.end && hidden(own + end - WIDTH)) end -= WIDTH;
    while (end > seen.end && own[end - 1] <= MASKED) end--;
    while (begin + WIDTH <= seen.begin && hidden(own + begin)) begin += WIDTH;
    while (begin < seen.begin && own[begin] <= MASKED) begin++;
    seen.end = seen.end < end ? end : seen.end;
    seen.begin = seen.begin > begin ? begin : seen.begin;
  }
  return seen.begin < seen.end ? seen : (struct range){0, 0};
}

/* `n` queries of one key head, the first of them `from`, into `out`. room: see `attention` */
static void attend(const struct sizes *s, long row, long head, long from, long n, const float *q,
                   const char *k, const char *v, const float *mask, float *out, float *room) {
  const long groups = s->heads / s->key_heads, dim = s->dim, wide = whole_panels(dim);
  const float *const masks = mask + row * s->mask_row + from / groups * s->mask_query;
  const long places = (from + n - 1) / groups - from / groups + 1;
  const struct range seen = visible(s, masks, s->mask_query ? places : 1);
  const long keys = seen.end - seen.begin, filled = whole_panels(keys);
  const int pairs = in_pairs(s);
  multiply_t *const times = pairs ? of_pairs : of_floats;
  float *scores = room, *scaled = scores + n * filled, *panel = scaled + n * wide;
  float *value = panel + dim * PANEL;
  for (long t = 0; t < n; t++) {
    const long i = (from + t) / groups, h = head * groups + (from + t) % groups;
    const float *source = q + (row * s->queries + i) * s->q_stride + h * dim;
    float *const own = scaled + t * wide;
    for (long d = 0; d < dim; d++) own[d] = source[d] * s->scale;
    if (pairs) pair_up(own, (bits *)own, dim);
  }
  struct job job = {.panel = (const char *)panel, .step = PANEL * 4, .x_stride = wide};
  job.in = pairs ? dim / 2 : dim, job.out = filled, job.cols = PANEL;
  const char *first_key =
      k + (row * s->k_row + head * s->k_head + seen.begin * s->k_key) * s->bytes;
  for (long j = 0; j < keys; j += PANEL) {
    for (long c = 0; c < PANEL; c++) {
      const long key = j + c < keys ? j + c : keys - 1;
      widen(panel + c, PANEL, first_key + key * s->k_key * s->bytes, job.in, pairs ? 4 : s->bytes);
    }
    times_panel(times, n, scaled, scores + j, job);
  }
  float inverse[QUERIES];
  for (long t = 0; t < n; t++) {
    const long i = (from + t) / groups - from / groups;
    float *const own = scores + t * filled;
    inverse[t] = weigh(own, masks + i * s->mask_query + seen.begin, keys, pairs);
    if (pairs) pair_weights(own, keys);
  }
  job.in = pairs ? (keys + 1) / 2 : keys, job.x_stride = filled, job.out = wide;
  for (long d = 0; d < dim; d += PANEL) { /* the scaled queries' place takes their sums */
    const char *from_v =
        v + (row * s->v_row + head * s->v_head + seen.begin * s->v_key + d) * s->bytes;
    const long apart = s->v_key * s->bytes;
    job.panel = from_v, job.step = apart;
    job.cols = dim - d < PANEL ? dim - d : PANEL;
    if (job.cols < PANEL || s->bytes != 4) {
      for (long j = 0; j < (long)job.in; j++) {
        float *const to = value + j * PANEL;
        if (pairs)
          pair_values(to, from_v + 2 * j * apart,
                      2 * j + 1 < keys ? from_v + (2 * j + 1) * apart : NULL, job.cols);
        else
          widen(to, 1, from_v + j * apart, job.cols, s->bytes);
        memset(to + job.cols, 0, (PANEL - job.cols) * sizeof(float));
      }
      job.panel = (const char *)value, job.step = PANEL * 4;
    }
    times_panel(times, n, scores, scaled + d, job);
  }
  for (long t = 0; t < n; t++) {
    const long i = (from + t) / groups, h = head * groups + (from + t) % groups;
    float *target = out + ((row * s->queries + i) * s->heads + h) * dim;
    for (long d = 0; d < dim; d++) target[d] = scaled[t * wide + d] * inverse[t];
  }
}

/* softmax(scale q k^T + mask) v for every query of every row.
 * q: rows * queries of q_stride floats, heads * dim of them used; k, v: (rows, key_heads, keys, dim)
 * by strides, in floats or bfloat16; mask: at [row][query][key] by strides, keys together; out (rows,
 * queries, heads, dim). Returns 0, or 1 where there is no memory. */
int attention(const float *q, const char *k, const char *v, const float *mask, float *out,
              const struct sizes *s, int threads) {
  const long queries = s->heads / s->key_heads * s->queries; /* of each key head */
  const long most = queries < QUERIES ? queries : QUERIES;
  const long filled = whole_panels(s->keys);
  const long jobs = s->rows * s->key_heads;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const long floats = most * (filled + whole_panels(s->dim)) + s->dim * PANEL + copied(s);
    float *room = malloc(floats * sizeof(float));
    if (!room) failed = 1;
#pragma omp for schedule(static)
    for (long job = 0; job < jobs; job++)
      for (long from = 0; room && from < queries; from += most)
        attend(s, job / s->key_heads, job % s->key_heads, from,
               queries - from < most ? queries - from : most, q, k, v, mask, out, room);
    free(room);
  }
  return failed;
}
