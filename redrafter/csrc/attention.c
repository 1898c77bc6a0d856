/* Attention of few queries, by the products of products.c. Source: ours. */

#define QUERIES 48         /* whose scores are kept at once */
#define ONE 1073741824.0f  /* 2^30 */
#define FEW (4096 * WIDTH) /* weights whose halves are summed in 32 bits */

/* Scores of one query to weights: masked, exp(score - the largest); returns 1 / their sum, or 0
 * where nothing may be seen. `keys` of them, filled up to whole vectors. Weights are summed as whole
 * numbers of ONE-ths: such a sum does not depend on an order, so it need not go one by one. */
static float weigh(float *scores, const float *mask, long keys) {
  const long filled = (keys + WIDTH - 1) / WIDTH * WIDTH;
  vec best = (vec){0} + 2 * MASKED;
  for (long j = keys; j < filled; j++) scores[j] = 2 * MASKED;
  for (long j = 0; j < keys / WIDTH * WIDTH; j += WIDTH)
    best = larger(best, *(vec *)(scores + j) += *(const vec *)(mask + j));
  for (long j = keys / WIDTH * WIDTH; j < keys; j++) scores[j] += mask[j];
  if (keys < filled) best = larger(best, *(vec *)(scores + filled - WIDTH));
  const float top = largest(best);
  int64_t sum = 0;
  for (long from = 0; from < filled; from += FEW) {
    const long end = filled - from < FEW ? filled : from + FEW;
    bits low = {0}, high = {0};
    for (long j = from; j < end; j += WIDTH) {
      const vec s = *(vec *)(scores + j);
      const ints seen = ~(s <= (vec){0} + MASKED); /* what is not a number stays so */
      const vec weight = (vec)((ints)exponential(s - top) & seen);
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
  const long groups = s->heads / s->key_heads, dim = s->dim;
  const float *const masks = mask + row * s->mask_row + from / groups * s->mask_query;
  const long places = (from + n - 1) / groups - from / groups + 1;
  const struct range seen = visible(s, masks, s->mask_query ? places : 1);
  const long keys = seen.end - seen.begin, filled = (keys + PANEL - 1) / PANEL * PANEL;
  float *scores = room, *scaled = scores + n * filled, *panel = scaled + n * dim;
  float *value = panel + dim * PANEL;
  for (long t = 0; t < n; t++) {
    const long i = (from + t) / groups, h = head * groups + (from + t) % groups;
    const float *source = q + (row * s->queries + i) * s->q_stride + h * dim;
    for (long d = 0; d < dim; d++) scaled[t * dim + d] = source[d] * s->scale;
  }
  struct job job = {.panel = (const char *)panel, .step = PANEL * 4, .in = dim, .x_stride = dim};
  job.out = filled, job.cols = PANEL;
  const char *first_key =
      k + (row * s->k_row + head * s->k_head + seen.begin * s->k_key) * s->bytes;
  for (long j = 0; j < keys; j += PANEL) {
    for (long c = 0; c < PANEL; c++) {
      const long key = j + c < keys ? j + c : keys - 1;
      widen(panel + c, PANEL, first_key + key * s->k_key * s->bytes, dim, s->bytes);
    }
    times_panel(of_floats, n, scaled, scores + j, job);
  }
  float inverse[QUERIES];
  for (long t = 0; t < n; t++) {
    const long i = (from + t) / groups - from / groups;
    inverse[t] = weigh(scores + t * filled, masks + i * s->mask_query + seen.begin, keys);
  }
  job.in = keys, job.x_stride = filled, job.out = dim;
  for (long d = 0; d < dim; d += PANEL) { /* the scaled queries' place takes their sums */
    const char *from_v =
        v + (row * s->v_row + head * s->v_head + seen.begin * s->v_key + d) * s->bytes;
    job.panel = from_v, job.step = s->v_key * 4;
    job.cols = dim - d < PANEL ? dim - d : PANEL;
    if (job.cols < PANEL || s->bytes != 4) {
      for (long j = 0; j < keys; j++) {
        widen(value + j * PANEL, 1, from_v + j * s->v_key * s->bytes, job.cols, s->bytes);
        memset(value + j * PANEL + job.cols, 0, (PANEL - job.cols) * sizeof(float));
      }
      job.panel = (const char *)value, job.step = PANEL * 4;
    }
    times_panel(of_floats, n, scores, scaled + d, job);
  }
  for (long t = 0; t < n; t++) {
    const long i = (from + t) / groups, h = head * groups + (from + t) % groups;
    float *target = out + ((row * s->queries + i) * s->heads + h) * dim;
    for (long d = 0; d < dim; d++) target[d] = scaled[t * dim + d] * inverse[t];
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
  const long filled = (s->keys + PANEL - 1) / PANEL * PANEL;
  const long jobs = s->rows * s->key_heads;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const long floats = most * (filled + s->dim) + s->dim * PANEL + copied(s);
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
