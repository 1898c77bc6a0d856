/* Products of few rows with a matrix in panels, and what stands around them.
 *
 * Source: ours; the register tile is that of Goto and van de Geijn's GEBP (ACM TOMS 34(3), 2008).
 */

#define TILE 6 /* rows of a register tile: 12 registers hold sums, of 16 */
#if WIDTH == 16
#define ROWS 12 /* at most, where that saves a second pass over a panel: of 32; two are slower */
#else
#define ROWS TILE
#endif
#define PANELS 4 /* of one, at most: of few rows it takes several, together TILE */
#define LINE 64  /* bytes of a cache line */
#define AHEAD 48 /* steps of k ahead that what is read once is fetched */
#define SHIFT 16

/* What lies in a panel. HALVES: bfloat16, to be multiplied by floats. PAIRS: bfloat16 of k and k + 1
 * together, to be multiplied by such pairs of x, which is rounded to bfloat16, and both summed up in
 * float32 by one instruction, where there is one: half the work. */
enum kind { PAIRS = 1, HALVES = 2, FLOATS = 4 };

/* Bytes that a column takes at each step of k, of which there are half as many in pairs. */
INLINE size_t bytes_of(int kind) { return kind == HALVES ? 2 : 4; }

/* Two vectors of W. A bfloat16 is the upper half of a float; the two halves of each 32 bits are
 * entries WIDTH apart, so that a shift and a mask give them. */
INLINE void load(const char *w, const int kind, vec *w0, vec *w1) {
  if (kind != HALVES) {
    *w0 = *(const vec *)w, *w1 = *(const vec *)(w + WIDTH * 4);
  } else {
    const bits both = *(const bits *)w;
    *w0 = (vec)(both << 16), *w1 = (vec)(both & 0xffff0000u);
  }
}

#if WIDTH == 16 && defined __AVX512BF16__
#define HAS_PAIRS 1
#include <immintrin.h>

/* sum + a[k] w[k] + a[k + 1] w[k + 1] of every column. */
INLINE vec plus_pairs(vec sum, vec a, vec w) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)w);
}

/* Two vectors as bfloat16, rounded to nearest, ties to even. */
INLINE bits round_pairs(const float *x) {
  return (bits)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + WIDTH), _mm512_loadu_ps(x));
}
#else
#define HAS_PAIRS 0
INLINE vec plus_pairs(vec sum, vec a, vec w) { return sum + a + w; } /* never called */
INLINE bits round_pairs(const float *x) { return *(const bits *)x; }
#endif

/* The pairs of n floats, filled up with zeros to whole vectors, one for every PANEL of them; they
 * may take the place of what they are made from. */
INLINE void pair_up(const float *from, bits *to, long n) {
  const long whole = n / PANEL * PANEL;
  float last[PANEL] = {0};
  memcpy(last, from + whole, (n - whole) * sizeof(float));
  for (long i = 0; i < whole; i += PANEL) to[i / PANEL] = round_pairs(from + i);
  if (whole < n) to[whole / PANEL] = round_pairs(last);
}

/* The pairs of each row of x; NULL where there is no memory. */
static bits *as_pairs(const float *x, long rows, long in, long stride) {
  const long each = (in + PANEL - 1) / PANEL;
  bits *const made = malloc((rows * each + 1) * sizeof(bits));
  for (long r = 0; made && r < rows; r++) pair_up(x + r * stride, made + r * each, in);
  return made;
}

struct step { /* y = onto + silu(x W^T + add), for some rows */
  const float *x;
  const char *w;           /* (panels, in, PANEL) of `kind`, the last filled up with zeros */
  const float *add, *onto; /* NULL: none */
  const int64_t *at;       /* which row of add is for each of x; NULL: one for `each` of x in turn */
  float *y;
  long in, out, x_stride, y_stride; /* floats between rows; those of add and onto lie together */
  long known, each;                 /* known: rows of add */
  int kind, silu, threads;          /* silu: or x W^T + add itself */
};

struct job { /* rows times one panel: PANEL entries at each of `in` steps */
  const char *panel, *next; /* next: what is to be fetched while k goes on, */
  size_t rate, step;        /* at `rate` / 2^SHIFT times its speed; step: bytes from k to k + 1 */
  size_t in, x_stride, out, cols; /* out: floats between rows of y; cols: written, at most PANEL */
  size_t panels;                  /* one behind the other, as many as go together; 0 or 1: one */
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

/* A number, or a pair of them, in every place. */
INLINE vec everywhere(const float *x) {
  uint32_t same;
  memcpy(&same, x, sizeof same);
  return (vec)(same - (bits){0});
}

/* `rows` times `panels`, constants of at most ROWS and PANELS; several panels are whole and lie
 * one behind the other. One row keeps two sums going, each of which waits for itself, and memory
 * is read faster in several places at once. */
INLINE void block(const int rows, const int panels, const int kind, const float *restrict x,
                  float *restrict y, const struct job *restrict job) {
  const size_t in = job->in, rate = job->rate, stride = job->x_stride;
  const size_t step = panels > 1 ? PANEL * bytes_of(kind) : job->step, apart = in * step;
  vec sum[ROWS][PANELS][2];
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < panels; p++) sum[r][p][0] = sum[r][p][1] = (vec){0};
  for (size_t k = 0; k < in; k++) {
    const char *const panel = job->panel + k * step;
    const char *const next = panels > 1 ? panel + AHEAD * step
                                        : job->next + (k * rate >> SHIFT) * step;
    for (int p = 0; p < panels; p++) {
      for (size_t line = 0; line < PANEL * bytes_of(kind); line += LINE)
        __builtin_prefetch(next + p * apart + line, 0, 3);
      vec w0, w1;
      load(panel + p * apart, kind, &w0, &w1);
      for (int r = 0; r < rows; r++) {
        const vec b = everywhere(x + r * stride + k);
        if (kind == PAIRS) {
          sum[r][p][0] = plus_pairs(sum[r][p][0], b, w0);
          sum[r][p][1] = plus_pairs(sum[r][p][1], b, w1);
        } else {
          sum[r][p][0] += b * w0;
          sum[r][p][1] += b * w1;
        }
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

/* Panels of a block of so many rows. More would fit 32 registers, and is slower. */
#define TOGETHER(N) (TILE / (N) < PANELS ? TILE / (N) : PANELS)
#define ALONE(N) case N: block(N, 1, kind, x, y, job); break;
#define SEVERAL(N) case N: block(N, TOGETHER(N), kind, x, y, job); break;

INLINE void of_kind(const int kind, long n, const float *x, float *y, const struct job *job) {
  switch (n) {
    ALONE(1) ALONE(2) ALONE(3) ALONE(4) ALONE(5) ALONE(6)
#if ROWS == 12
    ALONE(7) ALONE(8) ALONE(9) ALONE(10) ALONE(11) ALONE(12)
#endif
  }
}

INLINE void several(const int kind, long n, const float *x, float *y, const struct job *job) {
  switch (n) { SEVERAL(1) SEVERAL(2) SEVERAL(3) }
}

/* To unpack halves takes registers, too. */
INLINE long together(long rows, int kind) {
  return rows == 3 && ROWS == 6 && kind == HALVES ? 1 : TOGETHER(rows);
}

#define KIND(NAME, OF)                                                                            \
  static void NAME(long n, const float *x, float *y, const struct job *job) {                     \
    job->panels > 1 ? several(OF, n, x, y, job) : of_kind(OF, n, x, y, job);                      \
  }
KIND(of_floats, FLOATS)
KIND(of_halves, HALVES)
KIND(of_pairs, PAIRS)

/* Any number of rows times one panel, in even shares; fetches what lies behind it meanwhile. */
static void times_panel(multiply_t *multiply, long rows, const float *x, float *y, struct job job) {
  const long blocks = rows <= ROWS ? 1 : (rows + TILE - 1) / TILE;
  job.rate = ((size_t)1 << SHIFT) / (size_t)blocks;
  for (long b = 0, r = 0; b < blocks; b++) {
    const long n = (rows - r + blocks - b - 1) / (blocks - b);
    job.next = job.panel + (blocks == 1 ? AHEAD : job.in + b * job.in / blocks) * job.step;
    job.row = r;
    multiply(n, x + r * job.x_stride, y + r * job.out, &job);
    r += n;
  }
}

static void multiply(const struct step *s, const struct step *around, long rows) {
  const long panels = rows > 0 ? (s->out + PANEL - 1) / PANEL : 0;
  const size_t step = PANEL * bytes_of(s->kind);
  multiply_t *const times = s->kind == FLOATS ? of_floats : s->kind == HALVES ? of_halves : of_pairs;
  const long per = rows > 0 ? together(rows, s->kind) : 1;
  const long groups = per > 1 ? s->out / PANEL / per : 0;
#pragma omp parallel for num_threads(s->threads) schedule(static) if (s->threads > 1)
  for (long g = 0; g < panels - groups * (per - 1); g++) { /* what is left are single ones */
    const long p = g < groups ? g * per : g + groups * (per - 1);
    const size_t first = p * PANEL;
    struct job job = {.panel = s->w + p * s->in * step, .step = step, .in = s->in};
    job.x_stride = s->x_stride, job.out = s->y_stride;
    job.cols = s->out - first < PANEL ? s->out - first : PANEL;
    job.around = s->add || s->onto || s->silu ? around : NULL, job.column = first;
    job.panels = g < groups ? per : 1;
    if (g < groups)
      times(rows, s->x, s->y + first, &job);
    else
      times_panel(times, rows, s->x, s->y + first, job);
  }
}

/* Returns 0, or 2 where there is no memory. */
static int take(const struct step *s, long rows) {
  if (s->kind != PAIRS) return multiply(s, s, rows), 0;
  bits *const pairs = as_pairs(s->x, rows, s->in, s->x_stride);
  if (!pairs) return 2;
  struct step paired = *s;
  paired.x = (const float *)pairs, paired.in = (s->in + 1) / 2;
  paired.x_stride = (s->in + PANEL - 1) / PANEL * WIDTH;
  multiply(&paired, s, rows);
  free(pairs);
  return 0;
}

/* One after the other, for as many rows. Where `in` is 0 the product is 0: what is added is copied.
 * Returns 0; 1, before anything is written, where a row is to be added that is not known; 2 where
 * there is no memory. */
int take_steps(const struct step *steps, long n, long rows) {
  for (long i = 0; i < n; i++)
    for (long r = 0; steps[i].at && r < rows; r++)
      if (steps[i].at[r] < 0 || steps[i].at[r] >= steps[i].known) return 1;
  int failed = 0;
  for (long i = 0; i < n && !failed; i++) failed = take(steps + i, rows);
  return failed;
}

/* A step alone; all contiguous. each: rows of x that one of add is for. Returns as `take` does. */
int product(const float *x, const char *w, int kind, const float *add, long each,
            const float *onto, int silu, float *y, long rows, long in, long out, int threads) {
  struct step step = {.x = x, .w = w, .add = add, .onto = onto, .y = y, .in = in, .out = out};
  step.x_stride = in, step.y_stride = out, step.each = each;
  step.kind = kind, step.silu = silu, step.threads = threads;
  return take(&step, rows);
}
