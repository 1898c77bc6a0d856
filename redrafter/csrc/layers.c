/* The layers of a decoder, all in one call: what is called for each of them is little beside a large
 * model, and a fifth of a step of a small one. Source: ours. */

struct map { /* of a layer: x W^T + add */
  const char *w;    /* as a step's */
  const float *add; /* NULL, or one row for all */
  long in, out;
  int kind;
};

struct layer {
  const float *norm, *q_norm, *k_norm, *mlp_norm; /* q_norm, k_norm: NULL, there are none */
  char *keys, *values;                            /* of the cache */
  const float *mask;
  long mask_row, mask_query;
  struct map qkv, out, gate_up, down;
  float eps, head_eps, mlp_eps;
};

struct decoder { /* what all layers have in common */
  const int64_t *positions, *slots; /* of each new token; slots: its place in the cache */
  const float *cos, *sin;
  const uint8_t *padding; /* of which tokens zeros are kept; NULL: of none */
  long width, known, layers, threads, small;
  struct sizes sizes;
};

static int threads_of(const struct decoder *d, long operations) {
  return operations > d->small ? d->threads : 1;
}

static int apply(const struct decoder *d, const struct map *m, const float *x, const float *onto,
                 float *y, long rows) {
  struct step step = {.x = x, .w = m->w, .y = y, .in = m->in, .out = m->out, .kind = m->kind};
  step.add = onto ? onto : m->add, step.each = onto ? 1 : rows;
  step.x_stride = m->in, step.y_stride = m->out;
  step.threads = threads_of(d, rows * m->in * m->out);
  return take(&step, rows);
}

/* To the nearest bfloat16, ties to even. */
INLINE uint16_t halve(float x) {
  uint32_t whole;
  memcpy(&whole, &x, sizeof whole);
  return x != x ? 0x7fc0 : (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
}

/* A token's keys, or values, into the cache. to: its place for the first head */
static void keep(const float *from, char *to, long heads, long apart, const struct sizes *s,
                 int none) {
  for (long h = 0; h < heads; h++, to += apart * s->bytes)
    for (long i = 0; i < s->dim; i++) {
      const float x = none ? 0 : from[h * s->dim + i];
      if (s->bytes == 4) {
        memcpy(to + i * 4, &x, 4);
      } else {
        const uint16_t half = halve(x);
        memcpy(to + i * 2, &half, 2);
      }
    }
}

struct room { /* of `rows` rows: what a layer makes on its way */
  float *normed, *qkv, *turned, *seen, *gate_up, *gated;
};

static int pass(const struct decoder *d, const struct layer *l, struct room r, const float *x,
                float *middle, float *y) {
  struct sizes s = d->sizes;
  const long rows = s.rows * s.queries, dim = s.dim, turned = (s.heads + s.key_heads) * dim;
  const int by_row = threads_of(d, rows * d->width);
  rms_norm(x, l->norm, l->eps, r.normed, rows, d->width, by_row);
  int failed = apply(d, &l->qkv, r.normed, NULL, r.qkv, rows);
  for (long i = 0; l->q_norm && i < rows; i++) {
    float *const q = r.qkv + i * l->qkv.out, *const k = q + s.heads * dim;
    rms_norm(q, l->q_norm, l->head_eps, q, s.heads, dim, 1);
    rms_norm(k, l->k_norm, l->head_eps, k, s.key_heads, dim, 1);
  }
  if (!failed && rotate(r.qkv, l->qkv.out, d->positions, d->known, d->cos, d->sin, r.turned, rows,
                        s.heads + s.key_heads, dim))
    return 1;
  for (long i = 0; !failed && i < rows; i++) {
    const long row = i / s.queries, none = d->padding && d->padding[i];
    char *const key = l->keys + (row * s.k_row + d->slots[i] * s.k_key) * s.bytes;
    char *const value = l->values + (row * s.v_row + d->slots[i] * s.v_key) * s.bytes;
    keep(r.turned + i * turned + s.heads * dim, key, s.key_heads, s.k_head, &s, none);
    keep(r.qkv + i * l->qkv.out + turned, value, s.key_heads, s.v_head, &s, none);
  }
  s.q_stride = turned, s.mask_row = l->mask_row, s.mask_query = l->mask_query;
  failed = failed || attention(r.turned, l->keys, l->values, l->mask, r.seen, &s,
                               threads_of(d, 2 * rows * s.heads * dim * s.keys));
  failed = failed || apply(d, &l->out, r.seen, x, middle, rows);
  if (failed) return 2;
  rms_norm(middle, l->mlp_norm, l->mlp_eps, r.normed, rows, d->width, by_row);
  if (apply(d, &l->gate_up, r.normed, NULL, r.gate_up, rows)) return 2;
  silu_gated(r.gate_up, r.gated, rows, l->down.in, threads_of(d, 4 * rows * l->down.in));
  return apply(d, &l->down, r.gated, middle, y, rows);
}

/* x (rows * queries, width) through all layers, in its place; the tokens' keys and values lie in the
 * cache then. Returns 0; 1 where a position is none of the `known`; 2 where there is no memory. */
int pass_layers(const struct decoder *d, const struct layer *layers, float *x) {
  const struct layer *const l = layers;
  const long rows = d->sizes.rows * d->sizes.queries, turned =
      (d->sizes.heads + d->sizes.key_heads) * d->sizes.dim;
  const long sizes[] = {d->width, d->width, l->qkv.out, turned, l->out.in, l->gate_up.out,
                        l->down.in};
  long floats = 0;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) floats += rows * sizes[i];
  float *const all = malloc((floats + 1) * sizeof(float));
  if (!all) return 2;
  float *part[sizeof sizes / sizeof *sizes], *next = all;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; next += rows * sizes[i++]) part[i] = next;
  const struct room room = {part[1], part[2], part[3], part[4], part[5], part[6]};
  int failed = 0;
  for (long i = 0; i < d->layers && !failed; i++)
    failed = pass(d, layers + i, room, x, part[0], x);
  free(all);
  return failed;
}
