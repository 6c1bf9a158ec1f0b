"""The C source of `blocks_cpu`: all blocks for a few new tokens, in calls of the functions that compute one layer.

It is a part of the library of `inference_cpu`, whose source stands before it.
"""

BODY = r"""
typedef void quantized(const void *, void *, const uint8_t *, const void *, const void *, char *, long, long, long,
                       long, long, int, int, int, int);
typedef void quantized_float32(const float *, float *, const uint8_t *, const void *, const void *, float *, long, long,
                               long, long, int, int, int);

typedef struct {  // a linear layer; bits: 0 for floats
  const char *weight, *scale, *bias;
  long in, out, groups, group, bits, scale_type;
} matrix;

typedef struct {
  const char *input_norm, *attention_norm;
  matrix query_key_value, dense, gate_up, down;
} block;

typedef struct {  // where a block's part of the cache is; strides in bytes
  char *keys, *values;
  long k_batch, k_group, k_token, v_batch, v_group, v_token;
} slots;

typedef struct {
  long blocks, batch, tokens, seen, heads, groups, size, hidden, inner, type, norm_type, threads;
  const float *cosine, *sine;
  long period;
  const uint8_t *mask;
  long mask_batch, mask_token, stretches, attention_scratch;
  char *x, *work, *scratch;
  quantized *multiply;
  quantized_float32 *multiply_float32;
  long overflow;  // set by a quantized product of floats that exceeded float32: on the way, perhaps
  float eps, scale;
} step;

/* y[n][out] = x[n][in] times a layer's weight, plus its bias. */
static void product(const matrix *m, const char *x, char *y, step *s) {
  const long n = s->batch * s->tokens;
  if (!m->bits)
    linear(x, m->weight, m->bias, y, (float *)s->scratch, n, m->in, m->out, s->type, s->threads);
  else if (s->type != FLOAT32)
    s->multiply(x, y, (const uint8_t *)m->weight, m->scale, m->bias, s->scratch, n, m->in, m->out, m->groups, m->group,
                m->bits, s->type, m->scale_type, s->threads);
  else {
    s->multiply_float32((const float *)x, (float *)y, (const uint8_t *)m->weight, m->scale, m->bias,
                        (float *)s->scratch, n, m->in, m->out, m->groups, m->bits, m->scale_type, s->threads);
    const word *bits = (const word *)y;
    word infinite = 0;  // or nan
    for (long i = 0; i < n * m->out; i++) infinite |= (bits[i] & 0x7f800000) == 0x7f800000;
    s->overflow |= infinite;
  }
}

typedef union { floats all; __m256 part[LANES / 8]; } lanes;

/* x / (1 + exp(-x)), by exp(-|x|), which does not overflow. */
INLINE floats silu(floats x) {
  const words negative = (words)((ints)x >> 31);
  const floats e = power_of_2((floats)((words)x | 0x80000000) * 1.44269504088896f), one = (floats){0} + 1;
  return x * (floats)((words)e & negative | (words)one & ~negative) / (1 + e);
}

/* Numbers `from` to `to` of y. */
INLINE void gate(const char *x, char *y, long from, long to, long size, int type) {
  for (long i = from; i < to; i += LANES) {
    lanes v;
    UNROLLED (int j = 0; j < LANES / 8; j++) v.part[j] = load(x, type, i + 8 * j, to - i - 8 * j);
    v.all = silu(v.all);
    UNROLLED (int j = 0; j < LANES / 8; j++) {
      const __m256 up = load(x, type, size + i + 8 * j, to - i - 8 * j);
      store(y, type, i + 8 * j, to - i - 8 * j, _mm256_mul_ps(rounded(v.part[j], type), up));
    }
  }
}

/* y[n][size] = silu(gate) * up, for rows of x that hold gate[size] and up[size]; silu is rounded to `type`, too. */
void gated(const char *x, char *y, long n, long size, int type, int threads) {
  const long bytes = size * size_of(type), parts = (size + 511) / 512;
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (long item = 0; item < n * parts; item++) {
    const long row = item / parts, from = item % parts * 512;
    #define GATE(TYPE) gate(x + 2 * row * bytes, y + row * bytes, from, min(size, from + 512), size, TYPE)
    FOR_TYPE(GATE);
  }
}

INLINE void add(char *x, const char *y, long n, int type) {
  for (long i = 0; i < n; i += 8)
    store(x, type, i, n - i, _mm256_add_ps(load(x, type, i, n - i), load(y, type, i, n - i)));
}

/* x[n] += y[n] */
static void add_to(char *x, const char *y, long n, int type) {
  #define ADD_TO(TYPE) add(x, y, n, TYPE)
  FOR_TYPE(ADD_TO);
}

/* The new tokens' keys or values, rows of `from` that are from_token bytes apart, to their slots in the cache. */
static void to_cache(const char *from, long from_token, char *to, long batch, long group, long token, const step *s) {
  const long bytes = s->size * size_of(s->type);
  for (long b = 0; b < s->batch; b++)
    for (long t = 0; t < s->tokens; t++)
      for (long g = 0; g < s->groups; g++)
        memcpy(to + b * batch + g * group + (s->seen + t) * token, from + (b * s->tokens + t) * from_token + g * bytes,
               bytes);
}

/* x[batch][tokens][hidden] = the last block's output, in place. Each block's keys and values go to the cache's slots
   behind `seen`. work: for each token twice hidden, three times heads + 2 groups of size, three times inner. It stops
   after an overflow. */
void blocks(const block *b, const slots *c, step *s) {
  const long n = s->batch * s->tokens, bytes = size_of(s->type), head = s->size * bytes, all = s->heads + s->groups;
  const long qkv = (all + s->groups) * head;  // of a token
  const int type = s->type, threads = s->threads;
  char *x = s->x, *normed = s->work, *mixed = normed + n * s->hidden * bytes, *rotated = mixed + n * qkv;
  char *attended = rotated + n * qkv, *update = attended + n * qkv, *wide = update + n * s->hidden * bytes;
  char *narrow = wide + 2 * n * s->inner * bytes;
  shape a = {s->batch, s->tokens, s->seen + s->tokens, s->heads, s->groups, s->size, s->tokens * all * head, head,
             all * head};
  a.mask_batch = s->mask_batch, a.mask_token = s->mask_token, a.causal = !s->mask && s->tokens > 1;
  a.q_type = a.k_type = a.v_type = type;
  a.stretches = s->stretches, a.threads = threads, a.scratch = s->attention_scratch;
  for (long i = 0; i < s->blocks && !s->overflow; i++, b++, c++) {
    rms_norm(x, b->input_norm, normed, n, s->hidden, s->eps, type, s->norm_type, threads);
    product(&b->query_key_value, normed, mixed, s);
    rotate(mixed, s->cosine, s->sine, rotated, n, all, s->size, s->period, qkv, type, threads);
    to_cache(rotated + s->heads * head, all * head, c->keys, c->k_batch, c->k_group, c->k_token, s);
    to_cache(mixed + all * head, qkv, c->values, c->v_batch, c->v_group, c->v_token, s);
    a.k_batch = c->k_batch, a.k_group = c->k_group, a.k_token = c->k_token;
    a.v_batch = c->v_batch, a.v_group = c->v_group, a.v_token = c->v_token;
    attention(rotated, c->keys, c->values, s->mask, attended, (float *)s->scratch, s->scale, &a);
    product(&b->dense, attended, update, s);
    add_to(x, update, n * s->hidden, type);
    rms_norm(x, b->attention_norm, normed, n, s->hidden, s->eps, type, s->norm_type, threads);
    product(&b->gate_up, normed, wide, s);
    gated(wide, narrow, n, s->inner, type, threads);
    product(&b->down, narrow, update, s);
    add_to(x, update, n * s->hidden, type);
  }
}
"""
