/* What goes row by row: norms, gated activations, rotations. Source: ours. */

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
