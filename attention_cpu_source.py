"""The C source of attention on a CPU, a part of the library of `inference_cpu`.

A tile of keys is widened to float32 in the first-level cache. The lanes of a vector are query rows: the heads of a
group for one token, then for the next. So the keys and values of a group are read once for all its heads, and a softmax
takes no sums across lanes. Both products are the same loop: floats broadcast from memory times vectors, queries in the
first product and values in the second.

AVX512-BF16 multiplies pairs of bfloat16 at twice float32's rate. Then a float of both factors is a pair: two channels
in the first product, two keys in the second. Scores are exact sums as before; probabilities are rounded to bfloat16,
as eager attention rounds them.

A long context is split into stretches of keys for several threads, as in Flash-Decoding. Each has its own softmax (its
largest score, its sum and its output), and a last pass combines them.
"""

TILE = 64  # keys that are widened at a time

BODY = r"""
enum { PANELS = 4 };  // of 1 or 2 vectors of query rows, which share a tile of keys
enum { MOST = 16 };  // rows of a product whose sums are in registers
enum { NONE, SOME, ALL };
typedef uint16_t half __attribute__((may_alias));
static const float LOWEST = -3.4028235e38f;

int omp_get_thread_num(void);

typedef struct {  // strides are in bytes
  long batch, tokens, keys, heads, groups, size;
  long q_batch, q_head, q_token, k_batch, k_group, k_token, v_batch, v_group, v_token, mask_batch, mask_token;
  long q_type, k_type, v_type, causal, stretches, threads, scratch;
} shape;

INLINE void widen_as(const char *from, int type, long row_bytes, long n, long size, long stride, float *to) {
  const long vectors = size - size % LANES;
  for (long j = 0; j < n; j++) {
    const char *row = from + j * row_bytes;
    for (long i = 0; i < vectors; i += LANES) *(floats *)(to + j * stride + i) = widened(row + i * size_of(type), type);
    if (vectors < size) _mm256_storeu_ps(to + j * stride + vectors, load(row, type, vectors, 8));
  }
  for (long j = n; j % MOST; j++) memset(to + j * stride, 0, stride * sizeof *to);
}

/* n rows of `size` numbers as floats, and rows of zeros up to a multiple of MOST. */
static void widen(const char *from, int type, long row_bytes, long n, long size, long stride, float *to) {
  if (type == FLOAT16) widen_as(from, FLOAT16, row_bytes, n, size, stride, to);
  else if (type == BFLOAT16) widen_as(from, BFLOAT16, row_bytes, n, size, stride, to);
  else widen_as(from, FLOAT32, row_bytes, n, size, stride, to);
}

/* a and b rounded to pairs of bfloat16: a in the low halves, b in the high ones. */
INLINE floats paired(floats a, floats b) {
#ifdef __AVX512BF16__
  const words low = (words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
  const words high = (words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
  return (floats)(low | high << 16);
#endif
  return a;  // not called
}

/* n keys as pairs of channels, [n][stride / 2], and keys of zeros up to a multiple of MOST. */
static void copy_keys(const char *k, long n, long stride, const shape *s, float *keys) {
  for (long j = 0; j < n; j++) memcpy(keys + j * stride / 2, k + j * s->k_token, 2 * s->size);
  for (long j = n; j % MOST; j++) memset(keys + j * stride / 2, 0, 2 * s->size);
}

/* n values as pairs of two keys' values, [n / 2][stride]; a last one is paired with zeros. */
static void pair_values(const char *v, long n, long stride, const shape *s, float *values) {
  const long size = s->size;
  for (long j = 0; j < n; j += 2) {
    const half *even = (const half *)(v + j * s->v_token), *odd = (const half *)(v + (j + 1) * s->v_token);
    word *to = (word *)(values + j / 2 * stride);
    if (j + 1 < n)
      for (long d = 0; d < size; d++) to[d] = even[d] | (word)odd[d] << 16;
    else
      for (long d = 0; d < size; d++) to[d] = even[d];
  }
}

/* to[i][w] = to[i][w] * correction[i] + the sum over k of a[i * row + k * column] * b[k][w]; no correction: no first
   term. b has vectors of `type`, b_step bytes apart. Each k prefetches a line, `step` bytes apart. */
INLINE void multiply(const float *a, long row, long column, const char *b, int type, int pairs, long b_step, long depth,
                     int rows, int width, const float *correction, float *to, long to_row, const char *ahead,
                     long step) {
  floats sum[MOST][2], v[2];
  UNROLLED (int i = 0; i < rows; i++)
    UNROLLED (int w = 0; w < width; w++) sum[i][w] = (floats){0};
  for (long k = 0; k < depth; k++) {
    _mm_prefetch(ahead + k * step, _MM_HINT_T1);
    UNROLLED (int w = 0; w < width; w++) v[w] = widened(b + k * b_step + w * LANES * size_of(type), type);
    UNROLLED (int i = 0; i < rows; i++)
      UNROLLED (int w = 0; w < width; w++)
        sum[i][w] = plus(sum[i][w], v[w], broadcast(a + i * row + k * column), pairs);
  }
  UNROLLED (int i = 0; i < rows; i++)
    UNROLLED (int w = 0; w < width; w++) {
      floats *at = (floats *)(to + i * to_row + w * LANES);
      if (correction) sum[i][w] += *at * correction[i];
      *at = sum[i][w];
    }
}

/* Which of the keys `from` to `to` a token attends to. */
static int attends(const shape *s, const uint8_t *mask, long token, long from, long to) {
  const long end = s->causal ? min(to, token + 1) : to;
  long count = 0;
  if (from >= end) return NONE;
  if (!mask) return end == to ? ALL : SOME;
  for (long j = from; j < end; j++) count += mask[token * s->mask_token + j];
  return count == to - from ? ALL : count ? SOME : NONE;
}

typedef struct {  // keys and values as floats, [TILE][stride], or as pairs; or where the values, or pairs of keys, are
  const float *keys, *values;
  float *scores, scale;  // scale: of the scores of pairs; otherwise the query has it
  const char *direct, *next_k, *next_v;  // next: where the next tile is
} tile_of_keys;

/* One tile for one panel of query rows: online softmax. q: [size][lanes]; o: [lanes][stride]. */
INLINE void tile_step(const tile_of_keys *tile, long n, long stride, int width, int pairs, const float *q, float *o,
                      float *largest, float *total, const shape *s, const uint8_t *mask, long first_row, long rows,
                      long from, int state) {
  const int lanes = width * LANES, unroll = LANES == 16 ? MOST / width : 8 / width, deep = pairs ? 2 : 1;
  const long size = s->size, group = s->heads / s->groups, row = stride / deep, depth = size / deep;
  float *p = tile->scores, correction[2 * LANES];
  for (long j = 0; j < n; j += unroll)
    multiply(tile->keys + j * row, row, 1, (const char *)q, FLOAT32, pairs, 4 * lanes, depth, unroll, width, 0,
             p + j * lanes, lanes, tile->next_k + j * s->k_token, s->k_token * unroll / depth);
  if (pairs)
    for (long i = 0; i < n * lanes; i += LANES) *(floats *)(p + i) *= tile->scale;
  if (state == SOME)
    for (long r = 0, token = first_row / group; r < rows; token++) {  // the lanes of one token after another
      const long end = min(rows, (token + 1) * group - first_row);
      for (long j = 0; j < n; j++)
        if ((mask && !mask[token * s->mask_token + from + j]) || (s->causal && from + j > token))
          for (long lane = r; lane < end; lane++) p[j * lanes + lane] = -__builtin_inff();
      r = end;
    }
  UNROLLED (int w = 0; w < width; w++) {
    floats *all = (floats *)(p + w * LANES), *most = (floats *)(largest + w * LANES);
    floats top = *most, part = {0};
    for (long j = 0; j < n; j++) top = larger(all[j * width], top);
    const floats change = power_of_2(*most - top);
    *most = top;
    for (long j = 0; j < n; j++) {
      all[j * width] = power_of_2(all[j * width] - top);
      part += all[j * width];
    }
    floats *sum = (floats *)(total + w * LANES);
    *sum = *sum * change + part;
    *(floats *)(correction + w * LANES) = change;
    if (pairs)
      for (long j = 0; j < n; j += 2)
        all[j / 2 * width] = paired(all[j * width], j + 1 < n ? all[(j + 1) * width] : (floats){0});
  }
  #define WEIGH(VALUES, TYPE, STEP) \
    for (long d = 0; d < size; d += lanes) \
      for (int r = 0; r < lanes && r < rows; r += unroll) \
        multiply(p + r, 1, lanes, (VALUES) + d * size_of(TYPE), TYPE, pairs, STEP, (n + deep - 1) / deep, unroll, \
                 width, correction + r, o + r * stride + d, stride, \
                 tile->next_v + (d + r) * n * s->v_token / size, s->v_token * unroll * deep / size);
  if (!tile->direct) WEIGH((const char *)tile->values, FLOAT32, 4 * stride)
  else if (s->v_type == FLOAT16) WEIGH(tile->direct, FLOAT16, s->v_token)
  else if (s->v_type == BFLOAT16) WEIGH(tile->direct, BFLOAT16, s->v_token)
  else WEIGH(tile->direct, FLOAT32, s->v_token)
}

/* The softmax of a block of query rows over the keys of one stretch. state: output [panels * lanes][stride], then
   largest and total [panels * lanes]. scratch: the query [panels * lanes][stride], a tile's keys and values
   [TILE][stride], of which pairs take half, and scores [TILE][lanes]. */
INLINE void stretch_of(const char *q, const char *k, const char *v, const uint8_t *mask, float scale, const shape *s,
                       long g, long first_row, long rows, long from, long to, int width, long stride, int pairs,
                       float *state, float *scratch) {
  const long lanes = width * LANES, panels = (rows + lanes - 1) / lanes, group = s->heads / s->groups;
  const int direct = LANES == 16 && width == 1 && s->size % 16 == 0 && !pairs;
  float *largest = state + panels * lanes * stride, *total = largest + panels * lanes;
  float *query = scratch, *keys = query + panels * lanes * stride, *values = keys + TILE * stride;
  float *scores = values + TILE * stride;
  memset(query, 0, panels * lanes * stride * sizeof *query);
  memset(state, 0, panels * lanes * stride * sizeof *state);
  for (long r = 0; r < panels * lanes; r++) {
    largest[r] = LOWEST;
    total[r] = 0;
    if (r >= rows) continue;
    const long token = (first_row + r) / group, head = g * group + (first_row + r) % group;
    const char *row = q + head * s->q_head + token * s->q_token;
    float *column = query + r / lanes * stride * lanes + r % lanes, part[8];
    for (long d = 0; d < s->size; d += 8) {
      if (pairs) {
        for (int i = 0; i < 8; i += 2) memcpy(column + (d + i) / 2 * lanes, row + 2 * (d + i), 4);
        continue;
      }
      _mm256_storeu_ps(part, load(row, s->q_type, d, 8));
      for (int i = 0; i < 8; i++) column[(d + i) * lanes] = part[i] * scale;
    }
  }
  for (long j = from; j < to; j += TILE) {
    const long n = min(TILE, to - j);
    int states[PANELS], used = 0;
    for (long panel = 0; panel < panels; panel++) {
      const long first = first_row + panel * lanes, last = min(first_row + rows, first + lanes) - 1;
      states[panel] = attends(s, mask, first / group, j, j + n);
      for (long t = first / group + 1; t <= last / group; t++)
        if (attends(s, mask, t, j, j + n) != states[panel]) states[panel] = SOME;
      used |= states[panel];
    }
    if (!used) continue;
    const char *from_k = k + j * s->k_token, *from_v = v + j * s->v_token;
    tile_of_keys tile = {keys, values, scores, scale, direct ? from_v : 0, from_k + TILE * s->k_token,
                         from_v + TILE * s->v_token};
    if (pairs) {
      if (s->k_token == 2 * stride && n % MOST == 0) tile.keys = (const float *)from_k;
      else copy_keys(from_k, n, stride, s, keys);
      pair_values(from_v, n, stride, s, values);
    } else {
      widen(from_k, s->k_type, s->k_token, n, s->size, stride, keys);
      if (!direct) widen(from_v, s->v_type, s->v_token, n, s->size, stride, values);
    }
    for (long panel = 0, r = 0; panel < panels; panel++, r += lanes)
      if (states[panel])
        tile_step(&tile, n, stride, width, pairs, query + r * stride, state + r * stride, largest + r, total + r, s,
                  mask, first_row + r, min(lanes, rows - r), j, states[panel]);
  }
}

typedef void (*kernel)(const char *, const char *, const char *, const uint8_t *, float, const shape *, long, long,
                       long, long, long, float *, float *);
#define KERNEL(WIDTH, STRIDE, PAIRS) static void kernel_##WIDTH##_##STRIDE##_##PAIRS(const char *q, const char *k, \
    const char *v, const uint8_t *mask, float scale, const shape *s, long g, long first_row, long rows, long from, \
    long to, float *state, float *scratch) { \
  stretch_of(q, k, v, mask, scale, s, g, first_row, rows, from, to, WIDTH, STRIDE, PAIRS, state, scratch); \
}
KERNEL(1, 128, 0) KERNEL(2, 128, 0) KERNEL(1, 256, 0) KERNEL(2, 256, 0)
#ifdef __AVX512BF16__
KERNEL(1, 128, 1) KERNEL(2, 128, 1) KERNEL(1, 256, 1) KERNEL(2, 256, 1)
#endif

/* For query rows in one or two vectors, and keys of size up to `stride`. */
static kernel kernel_for(const shape *s, int width, long stride) {
#ifdef __AVX512BF16__
  if (s->q_type == BFLOAT16 && s->k_type == BFLOAT16 && s->v_type == BFLOAT16)
    return width == 1 ? stride == 128 ? kernel_1_128_1 : kernel_1_256_1
                      : stride == 128 ? kernel_2_128_1 : kernel_2_256_1;
#endif
  return width == 1 ? stride == 128 ? kernel_1_128_0 : kernel_1_256_0
                    : stride == 128 ? kernel_2_128_0 : kernel_2_256_0;
}

/* Join the softmaxes of a block's stretches, and write its rows. */
static void finish(const float *state, long stretches, long state_size, char *out, const shape *s, long g,
                   long first_row, long rows, long stride, long all_lanes) {
  const long group = s->heads / s->groups;
  for (long r = 0; r < rows; r++) {
    const float *top = state + all_lanes * stride + r, *sum = top + all_lanes;
    float largest = LOWEST, total = 0, weight[stretches], row[stride];
    for (long i = 0; i < stretches; i++) largest = top[i * state_size] > largest ? top[i * state_size] : largest;
    for (long i = 0; i < stretches; i++) {
      weight[i] = power_of_2((floats){0} + (top[i * state_size] - largest))[0];
      total += weight[i] * sum[i * state_size];
    }
    memset(row, 0, sizeof row);
    for (long i = 0; i < stretches; i++)
      for (long d = 0; d < s->size; d++) row[d] += weight[i] * state[i * state_size + r * stride + d];
    const __m256 share = _mm256_set1_ps(total == 0 ? 0 : 1 / total);  // no key at all: zeros, as torch gives
    const long token = (first_row + r) / group, head = g * group + (first_row + r) % group;
    for (long d = 0; d < s->size; d += 8)
      store(out, s->q_type, (token * s->heads + head) * s->size + d, 8, _mm256_mul_ps(_mm256_loadu_ps(row + d), share));
  }
}

/* out [B, T, H, D] = softmax(q k^T scale) v, for q [B, H, T, D] and k, v [B, G, S, D]. scale includes log2(e); mask:
   bytes [B, T, S], or none. scratch: for each thread s->scratch floats, then a state for each block and stretch. */
void attention(const char *q, const char *k, const char *v, const uint8_t *mask, char *out, float *scratch, float scale,
               const shape *s) {
  const long group = s->heads / s->groups, all_rows = s->tokens * group, sets = s->batch * s->groups;
  const int width = all_rows > LANES ? 2 : 1;
  const long stride = s->size > 128 ? 256 : 128, lanes = width * LANES, block = lanes * PANELS;
  const kernel compute = kernel_for(s, width, stride);
  const long blocks = (all_rows + block - 1) / block, stretches = s->stretches, units = sets * blocks;
  const long length = ((s->keys + stretches - 1) / stretches + TILE - 1) / TILE * TILE;
  const long state_size = min(PANELS, (all_rows + lanes - 1) / lanes) * lanes * (stride + 2);
  const long out_batch = s->tokens * s->heads * s->size * size_of(s->q_type);
  float *states = scratch + s->threads * s->scratch;
  #pragma omp parallel num_threads(s->threads)
  {
    float *own = scratch + omp_get_thread_num() * s->scratch;
    #pragma omp for schedule(dynamic)
    for (long item = 0; item < units * stretches; item++) {
      const long i = item % stretches, unit = item / stretches, b = unit % sets / s->groups, g = unit % s->groups;
      const long first = (blocks - 1 - unit / sets) * block, rows = min(block, all_rows - first);  // the longest first
      const long all_lanes = (rows + lanes - 1) / lanes * lanes;
      float *state = stretches == 1 ? own : states + item * state_size;
      long to = min(s->keys, (i + 1) * length);
      if (s->causal) to = min(to, (first + rows - 1) / group + 1);
      compute(q + b * s->q_batch, k + b * s->k_batch + g * s->k_group, v + b * s->v_batch + g * s->v_group,
              mask ? mask + b * s->mask_batch : 0, scale, s, g, first, rows, i * length, to, state,
              own + state_size);
      if (stretches == 1) finish(state, 1, 0, out + b * out_batch, s, g, first, rows, stride, all_lanes);
    }
    #pragma omp for schedule(static)
    for (long unit = 0; unit < (stretches == 1 ? 0 : units); unit++) {
      const long first = (blocks - 1 - unit / sets) * block, rows = min(block, all_rows - first);
      finish(states + unit * stretches * state_size, stretches, state_size,
             out + unit % sets / s->groups * out_batch, s, unit % s->groups, first, rows, stride,
             (rows + lanes - 1) / lanes * lanes);
    }
  }
}
"""
