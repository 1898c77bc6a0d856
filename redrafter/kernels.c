/* The forward of a decoder for few rows in float32 on a CPU, by weights and keys of float32 or
 * bfloat16: products, attention, norms, rotations, gated activations; and the best children of a
 * beam.
 *
 * Two aims. Few rows multiply matrices that lie in no cache, so memory decides: a row more should
 * cost nothing until arithmetic takes as long as reading does. And a row's numbers depend on no
 * other row, bit for bit: every sum goes over k = 0, 1, ... in that order, whatever other rows there
 * are, however many, on however many threads, and masked keys between, whose values are finite, add
 * exact zeros.
 * Source: ours; the register tile is that of Goto and van de Geijn's GEBP (ACM TOMS 34(3), 2008),
 * exp that of Moshier's Cephes.
 */
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
#define ROWS 6         /* of a register tile */
#define PANELS 4       /* of one, at most: of few rows it takes several */
#define QUERIES 48     /* whose scores are kept at once */
#define LINE 64        /* bytes of a cache line */
#define AHEAD 48       /* steps of k ahead that what is read once is fetched */
#define SKIPPED (4 * WIDTH) /* scores that are passed over together */
#define SHIFT 16
#define ONE 1073741824.0f /* 2^30 */
#define FEW (4096 * WIDTH) /* weights whose halves are summed in 32 bits */
#define MASKED -1e30f  /* what a mask adds at least where nothing may be seen: the dtype's minimum */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

long panel_width(void) { return PANEL; }

int has_threads(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

/* ------------------------------------------------------------------------------ whole vectors */

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

/* ------------------------------------------------------------------------------------ products */

/* Two vectors of W, of `bytes` an entry. A bfloat16 is the upper half of a float; the two halves of
 * each 32 bits are entries WIDTH apart, so that a shift and a mask give them. */
INLINE void load(const char *w, const int bytes, vec *w0, vec *w1) {
  if (bytes == 4) {
    *w0 = *(const vec *)w, *w1 = *(const vec *)(w + WIDTH * 4);
  } else {
    const bits pairs = *(const bits *)w;
    *w0 = (vec)(pairs << 16), *w1 = (vec)(pairs & 0xffff0000u);
  }
}

struct step { /* y = onto + silu(x W^T + add), for some rows */
  const float *x;
  const char *w;           /* (panels, in, PANEL) of `bytes` an entry, the last filled up with zeros */
  const float *add, *onto; /* NULL: none */
  const int64_t *at;       /* which row of add is for each of x; NULL: one for `each` of x in turn */
  float *y;
  long in, out, x_stride, y_stride; /* floats between rows; those of add and onto lie together */
  long known, each;                 /* known: rows of add */
  int bytes, silu, threads;         /* silu: or x W^T + add itself */
};

struct job { /* rows times one panel: PANEL entries at each of `in` steps */
  const char *panel, *next; /* next: what is to be fetched while k goes on, */
  size_t rate, step;        /* at `rate` / 2^SHIFT times its speed; step: bytes from k to k + 1 */
  size_t in, x_stride, out, cols; /* out: floats between rows of y; cols: written, at most PANEL */
  const struct step *around;      /* what stands around the product; NULL: nothing */
  size_t row, column;             /* the first ones */
};

/* `cols` floats, mostly a whole panel: a number that is known needs no call. */
INLINE void copy(void *to, const void *from, size_t cols) {
  if (cols == PANEL)
    memcpy(to, from, PANEL * sizeof(float));
  else
    memcpy(to, from, cols * sizeof(float));
}

/* Of row r of a block; its own function, as blocks are many. */
static __attribute__((noinline)) void surround(vec *sum, int r, const struct job *job) {
  const struct step *around = job->around;
  const size_t row = job->row + r, cols = job->cols;
  vec part[2] = {{0}, {0}};
  if (around->add) {
    const size_t which = around->at ? (size_t)around->at[row] : row / around->each;
    copy(part, around->add + which * around->out + job->column, cols);
    sum[0] += part[0], sum[1] += part[1];
  }
  if (around->silu) sum[0] = silu(sum[0]), sum[1] = silu(sum[1]);
  if (around->onto) {
    copy(part, around->onto + row * around->out + job->column, cols);
    sum[0] += part[0], sum[1] += part[1];
  }
}

/* `rows` times `panels`, constants of at most ROWS and PANELS; several panels are whole and lie
 * one behind the other. One row keeps two sums going, each of which waits for itself, and memory
 * is read faster in several places at once. */
INLINE void block(const int rows, const int panels, const int bytes, const float *restrict x,
                  float *restrict y, const struct job *restrict job) {
  const size_t in = job->in, rate = job->rate, stride = job->x_stride;
  const size_t step = panels > 1 ? (size_t)PANEL * bytes : job->step, apart = in * step;
  vec sum[ROWS][PANELS][2];
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < panels; p++) sum[r][p][0] = sum[r][p][1] = (vec){0};
  for (size_t k = 0; k < in; k++) {
    const char *const panel = job->panel + k * step;
    const char *const next = panels > 1 ? panel + AHEAD * step
                                        : job->next + (k * rate >> SHIFT) * step;
    for (int p = 0; p < panels; p++) {
      for (int line = 0; line < PANEL * bytes; line += LINE)
        __builtin_prefetch(next + p * apart + line, 0, 3);
      vec w0, w1;
      load(panel + p * apart, bytes, &w0, &w1);
      for (int r = 0; r < rows; r++) {
        const vec b = x[r * stride + k] - (vec){0}; /* in every place */
        sum[r][p][0] += b * w0;
        sum[r][p][1] += b * w1;
      }
    }
  }
  struct job one = *job;
  for (int p = 0; p < panels; p++, one.column += PANEL)
    for (int r = 0; r < rows; r++) {
      vec made[2] = {sum[r][p][0], sum[r][p][1]};
      if (job->around) surround(made, r, &one);
      copy(y + r * job->out + p * PANEL, made, job->cols);
    }
}

typedef void multiply_t(long n, const float *x, float *y, const struct job *job);

#define BLOCKS(NAME, BYTES)                                                                       \
  static void NAME(long n, const float *x, float *y, const struct job *job) {                     \
    switch (n) {                                                                                  \
      case 1: block(1, 1, BYTES, x, y, job); break;                                               \
      case 2: block(2, 1, BYTES, x, y, job); break;                                               \
      case 3: block(3, 1, BYTES, x, y, job); break;                                               \
      case 4: block(4, 1, BYTES, x, y, job); break;                                               \
      case 5: block(5, 1, BYTES, x, y, job); break;                                               \
      case 6: block(6, 1, BYTES, x, y, job); break;                                               \
    }                                                                                             \
  }
BLOCKS(of_floats, 4)
BLOCKS(of_bfloat16, 2)

/* Panels of a block of so many rows, and such a block: what 16 registers hold the sums of. */
INLINE long together(long rows, int bytes) {
  return rows == 1 ? 4 : rows == 2 ? 3 : rows == 3 && bytes == 4 ? 2 : 1;
}

static void several(long rows, int bytes, const float *x, float *y, const struct job *job) {
  if (rows == 1)
    bytes == 4 ? block(1, 4, 4, x, y, job) : block(1, 4, 2, x, y, job);
  else if (rows == 2)
    bytes == 4 ? block(2, 3, 4, x, y, job) : block(2, 3, 2, x, y, job);
  else
    block(3, 2, 4, x, y, job);
}

/* Any number of rows times one panel, in even shares; fetches what lies behind it meanwhile. */
static void times_panel(multiply_t *multiply, long rows, const float *x, float *y, struct job job) {
  const long blocks = (rows + ROWS - 1) / ROWS;
  job.rate = ((size_t)1 << SHIFT) / (size_t)blocks;
  for (long b = 0, r = 0; b < blocks; b++) {
    const long n = (rows - r + blocks - b - 1) / (blocks - b);
    job.next = job.panel + (blocks == 1 ? AHEAD : job.in + b * job.in / blocks) * job.step;
    job.row = r;
    multiply(n, x + r * job.x_stride, y + r * job.out, &job);
    r += n;
  }
}

static void take(const struct step *s, long rows) {
  const long panels = rows > 0 ? (s->out + PANEL - 1) / PANEL : 0;
  const size_t step = (size_t)PANEL * s->bytes;
  multiply_t *const multiply = s->bytes == 4 ? of_floats : of_bfloat16;
  const long per = together(rows, s->bytes), groups = per > 1 ? s->out / PANEL / per : 0;
#pragma omp parallel for num_threads(s->threads) schedule(static) if (s->threads > 1)
  for (long g = 0; g < panels - groups * (per - 1); g++) { /* what is left are single ones */
    const long p = g < groups ? g * per : g + groups * (per - 1);
    const size_t first = p * PANEL;
    struct job job = {.panel = s->w + p * s->in * step, .step = step, .in = s->in};
    job.x_stride = s->x_stride, job.out = s->y_stride;
    job.cols = s->out - first < PANEL ? s->out - first : PANEL;
    job.around = s->add || s->onto || s->silu ? s : NULL, job.column = first;
    if (g < groups)
      several(rows, s->bytes, s->x, s->y + first, &job);
    else
      times_panel(multiply, rows, s->x, s->y + first, job);
  }
}

/* One after the other, for as many rows. Where `in` is 0 the product is 0: what is added is copied.
 * Returns 0, or, before anything is written, 1 where a row is to be added that is not known. */
int take_steps(const struct step *steps, long n, long rows) {
  for (long i = 0; i < n; i++)
    for (long r = 0; steps[i].at && r < rows; r++)
      if (steps[i].at[r] < 0 || steps[i].at[r] >= steps[i].known) return 1;
  for (long i = 0; i < n; i++) take(steps + i, rows);
  return 0;
}

/* A step alone; all contiguous. each: rows of x that one of add is for */
void product(const float *x, const char *w, int bytes, const float *add, long each,
             const float *onto, int silu, float *y, long rows, long in, long out, int threads) {
  struct step step = {.x = x, .w = w, .add = add, .onto = onto, .y = y, .in = in, .out = out};
  step.x_stride = in, step.y_stride = out, step.each = each;
  step.bytes = bytes, step.silu = silu, step.threads = threads;
  take(&step, rows);
}

/* ----------------------------------------------------------------------------------- attention */

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

/* ------------------------------------------------------------------------- what goes row by row */

/* y = w * x / sqrt(mean(x^2) + eps); (rows, width). */
void rms_norm(const float *x, const float *w, float eps, float *y, long rows, long width,
              int threads) {
  const long whole = width / WIDTH * WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long r = 0; r < rows; r++) {
    const float *row = x + r * width;
    float *to = y + r * width, sum = 0;
    vec squares = {0};
    for (long i = 0; i < whole; i += WIDTH) {
      const vec part = *(const vec *)(row + i);
      squares += part * part;
    }
    for (int i = 0; i < WIDTH; i++) sum += squares[i];
    for (long i = whole; i < width; i++) sum += row[i] * row[i];
    const float scale = 1 / __builtin_sqrtf(sum / width + eps);
    for (long i = 0; i < width; i++) to[i] = row[i] * scale * w[i];
  }
}

/* y = silu(g) * u of x = [g ; u]; x (rows, 2 width), y (rows, width). */
void silu_gated(const float *x, float *y, long rows, long width, int threads) {
  const long whole = width / WIDTH * WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long r = 0; r < rows; r++) {
    const float *g = x + 2 * r * width, *u = g + width;
    float *to = y + r * width;
    for (long i = 0; i < whole; i += WIDTH)
      *(vec *)(to + i) = silu(*(const vec *)(g + i)) * *(const vec *)(u + i);
    vec last[2] = {{0}, {0}};
    const size_t rest = (width - whole) * sizeof(float);
    memcpy(last, g + whole, rest), memcpy(last + 1, u + whole, rest);
    last[0] = silu(last[0]) * last[1];
    memcpy(to + whole, last, rest);
  }
}

/* Rotary positions: y = x cos + (the halves of x exchanged) sin. x: rows of x_stride floats, `heads`
 * heads of `dim` of them used; y (rows, heads, dim); cos, sin (known, dim), the sign in sin.
 * Returns 0, or 1 where a position is not one of the `known`. `restrict`: a compiler has no second
 * way through the loops, which might round otherwise, to be taken by where things happen to lie. */
int rotate(const float *restrict x, long x_stride, const int64_t *position, long known,
           const float *restrict cos, const float *restrict sin, float *restrict y, long rows,
           long heads, long dim) {
  const long half = dim / 2;
  for (long r = 0; r < rows; r++) {
    if (position[r] < 0 || position[r] >= known) return 1;
    const float *c = cos + position[r] * dim, *s = sin + position[r] * dim;
    for (long h = 0; h < heads; h++) {
      const float *a = x + r * x_stride + h * dim, *b = a + half;
      float *to = y + (r * heads + h) * dim;
      for (long i = 0; i < half; i++) to[i] = a[i] * c[i] + b[i] * s[i];
      for (long i = 0; i < half; i++) to[half + i] = b[i] * c[half + i] + a[i] * s[half + i];
    }
  }
  return 0;
}

/* --------------------------------------------------------------------------- children of a beam */

struct best { /* the first `kept` of `most` places are taken, the best in front */
  float *value;
  int64_t *token, *place;
  long kept, most;
};

/* Behind what is as good. */
static void insert(struct best *best, float value, int64_t token, int64_t place) {
  if (best->kept == best->most && !(value > best->value[best->most - 1])) return;
  long j = best->kept < best->most ? best->kept++ : best->most - 1;
  for (; j > 0 && best->value[j - 1] < value; j--) {
    best->value[j] = best->value[j - 1];
    best->token[j] = best->token[j - 1], best->place[j] = best->place[j - 1];
  }
  best->value[j] = value, best->token[j] = token, best->place[j] = place;
}

/* log(sum(exp(x))); not a number where one is not, where one is inf, and where all are -inf. */
static float log_sum_exp(const float *x, long n) {
  const long whole = n / WIDTH * WIDTH;
  vec last = (vec){0} - INFINITY, top = last, sum = {0};
  memcpy(&last, x + whole, (n - whole) * sizeof(float));
  for (long i = 0; i < whole; i += WIDTH) top = larger(*(const vec *)(x + i), top);
  const float most = largest(larger(last, top));
  for (long i = 0; i < whole; i += WIDTH) sum += exponential(*(const vec *)(x + i) - most);
  float total = 0;
  for (int i = 0; i < WIDTH; i++) total += sum[i];
  sum = exponential(last - most);
  for (int i = 0; i < n - whole; i++) total += sum[i];
  return most + logf(total);
}

/* Whether any of SKIPPED numbers, plus `less` and `more`, is above `least`. */
INLINE int any_above(const float *x, float less, float more, float least) {
  ints above = {0};
  for (int i = 0; i < SKIPPED; i += WIDTH)
    above |= (*(const vec *)(x + i) - less) + more > (vec){0} + least;
  return any_of(above);
}

/* The best `most` of all children of each of `rows` frontiers of `width` nodes, in order: scores
 * (rows, width, n) of what follows each node, as log-probabilities up to a constant of its own,
 * log_q (rows, width) of the paths to them; tokens, places, values (rows, most): their columns,
 * parents, and log-probabilities along the path. Of equal ones the first parent's first column comes
 * first; what is not a number, and all below a node that has such a score, counts as -inf.
 * most: at least 1, at most width * n. */
void best_children(const float *scores, const float *log_q, int64_t *tokens, int64_t *places,
                   float *values, long rows, long width, long n, long most, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long r = 0; r < rows; r++) {
    struct best best = {values + r * most, tokens + r * most, places + r * most, 0, most};
    for (long p = 0; p < width; p++) {
      const float *x = scores + (r * width + p) * n, more = log_q[r * width + p];
      const float less = log_sum_exp(x, n);
      for (long i = 0; i < n;) {
        const long end = i + SKIPPED < n ? i + SKIPPED : n;
        if (best.kept == most && end - i == SKIPPED &&
            !any_above(x + i, less, more, best.value[most - 1])) {
          i = end;
          continue;
        }
        for (; i < end; i++) {
          const float value = (x[i] - less) + more;
          insert(&best, value == value ? value : -INFINITY, i, p);
        }
      }
    }
  }
}
