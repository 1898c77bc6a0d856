/* The best children of a beam. Source: ours. */

#define SKIPPED (4 * WIDTH) /* scores that are passed over together */

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
