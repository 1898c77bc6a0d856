/* Products of few rows with a matrix in panels, and what stands around them.
 *
 * Source: ours; the register tile is that of Goto and van de Geijn's GEBP (ACM TOMS 34(3), 2008).
 */

#define ROWS 6   /* of a register tile */
#define PANELS 4 /* of one, at most: of few rows it takes several */
#define LINE 64  /* bytes of a cache line */
#define AHEAD 48 /* steps of k ahead that what is read once is fetched */
#define SHIFT 16

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
