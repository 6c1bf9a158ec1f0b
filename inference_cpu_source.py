"""The C source of `inference_cpu`: `source(instructions)` returns the whole file, for AVX512 or AVX2.

Attention: a tile of keys is widened to float32 in the first-level cache. The lanes of a vector are query rows: the
heads of a group for one token, then for the next. So the keys and values of a group are read once for all its heads,
and a softmax takes no sums across lanes. Both products are the same loop: floats broadcast from memory times vectors,
queries in the first product and values in the second.

A long context is split into stretches of keys for several threads, as in Flash-Decoding. Each has its own softmax (its
largest score, its sum and its output), and a last pass combines them.
"""

from .blocks_cpu_source import BODY as BLOCKS
from .quantization_cpu_source import HEAD

TILE = 64  # keys that are widened at a time
PANEL = 128  # tokens of a linear layer that are widened at a time

BODY = r"""
enum { PANELS = 4 };  // of 1 or 2 vectors of query rows, which share a tile of keys
enum { MOST = 16 };  // rows of a product whose sums are in registers
enum { NONE, SOME, ALL };
enum { MANY = LANES / 2 };  // tokens that a weight is multiplied with at a time
#define UNROLLED _Pragma("GCC unroll 16") for
static const float LOWEST = -3.4028235e38f;

int omp_get_thread_num(void);

typedef struct {  // strides are in bytes
  long batch, tokens, keys, heads, groups, size;
  long q_batch, q_head, q_token, k_batch, k_group, k_token, v_batch, v_group, v_token, mask_batch, mask_token;
  long q_type, k_type, v_type, causal, stretches, threads, scratch;
} shape;

/* Lane by lane; b where either is nan. */
INLINE floats larger(floats a, floats b) {
#ifdef __AVX512F__
  return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}

/* LANES numbers as floats. */
INLINE floats widened(const char *at, int type) {
  if (type == FLOAT32) return *(const floats *)at;
#ifdef __AVX512F__
  const __m256i half = _mm256_loadu_si256((const __m256i *)at);
  if (type == FLOAT16) return (floats)_mm512_cvtph_ps(half);
  return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
  return (floats)load(at, type, 0, 8);
#endif
}

/* 2^x for x <= 0; nan stays nan, and below 2^-126 it is 0. */
INLINE floats power_of_2(floats x) {
  x = larger((floats){0} - 127, x);
  const floats whole = (x + 12582912.0f) - 12582912.0f, f = x - whole;  // 1.5 * 2^23: rounds to an integer
  floats p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return p * (floats)((__builtin_convertvector(whole, ints) + 127) << 23);
}

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

/* to[i][w] = to[i][w] * correction[i] + the sum over k of a[i * row + k * column] * b[k][w]; no correction: no first
   term. b has vectors of `type`, b_step bytes apart. Each k prefetches a line, `step` bytes apart. */
INLINE void multiply(const float *a, long row, long column, const char *b, int type, long b_step, long depth, int rows,
                     int width, const float *correction, float *to, long to_row, const char *ahead, long step) {
  floats sum[MOST][2], v[2];
  UNROLLED (int i = 0; i < rows; i++)
    UNROLLED (int w = 0; w < width; w++) sum[i][w] = (floats){0};
  for (long k = 0; k < depth; k++) {
    _mm_prefetch(ahead + k * step, _MM_HINT_T1);
    UNROLLED (int w = 0; w < width; w++) v[w] = widened(b + k * b_step + w * LANES * size_of(type), type);
    UNROLLED (int i = 0; i < rows; i++)
      UNROLLED (int w = 0; w < width; w++) sum[i][w] += v[w] * a[i * row + k * column];
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

typedef struct {  // keys and values as floats, [TILE][stride], or where the values are; and where the next tile is
  float *keys, *values, *scores;
  const char *direct, *next_k, *next_v;
} tile_of_keys;

/* One tile for one panel of query rows: online softmax. q: [size][lanes]; o: [lanes][stride]. */
INLINE void tile_step(const tile_of_keys *tile, long n, long stride, int width, const float *q, float *o,
                      float *largest, float *total, const shape *s, const uint8_t *mask, long first_row, long rows,
                      long from, int state) {
  const int lanes = width * LANES, unroll = LANES == 16 ? MOST / width : 8 / width;
  const long size = s->size, group = s->heads / s->groups;
  float *p = tile->scores, correction[2 * LANES];
  for (long j = 0; j < n; j += unroll)
    multiply(tile->keys + j * stride, stride, 1, (const char *)q, FLOAT32, 4 * lanes, size, unroll, width, 0,
             p + j * lanes, lanes, tile->next_k + j * s->k_token, s->k_token * unroll / size);
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
  }
  #define WEIGH(VALUES, TYPE, STEP) \
    for (long d = 0; d < size; d += lanes) \
      for (int r = 0; r < lanes && r < rows; r += unroll) \
        multiply(p + r, 1, lanes, (VALUES) + d * size_of(TYPE), TYPE, STEP, n, unroll, width, correction + r, \
                 o + r * stride + d, stride, tile->next_v + (d + r) * n * s->v_token / size, \
                 s->v_token * unroll / size);
  if (!tile->direct) WEIGH((const char *)tile->values, FLOAT32, 4 * stride)
  else if (s->v_type == FLOAT16) WEIGH(tile->direct, FLOAT16, s->v_token)
  else if (s->v_type == BFLOAT16) WEIGH(tile->direct, BFLOAT16, s->v_token)
  else WEIGH(tile->direct, FLOAT32, s->v_token)
}

/* The softmax of a block of query rows over the keys of one stretch. state: output [panels * lanes][stride], then
   largest and total [panels * lanes]. scratch: the query [panels * lanes][stride], a tile's keys and values
   [TILE][stride] and scores [TILE][lanes]. */
INLINE void stretch_of(const char *q, const char *k, const char *v, const uint8_t *mask, float scale, const shape *s,
                       long g, long first_row, long rows, long from, long to, int width, long stride, float *state,
                       float *scratch) {
  const long lanes = width * LANES, panels = (rows + lanes - 1) / lanes, group = s->heads / s->groups;
  const int direct = LANES == 16 && width == 1 && s->size % 16 == 0;
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
    float *column = query + r / lanes * stride * lanes + r % lanes, part[8];
    for (long d = 0; d < s->size; d += 8) {
      _mm256_storeu_ps(part, load(q + head * s->q_head + token * s->q_token, s->q_type, d, 8));
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
    widen(k + j * s->k_token, s->k_type, s->k_token, n, s->size, stride, keys);
    if (!direct) widen(v + j * s->v_token, s->v_type, s->v_token, n, s->size, stride, values);
    const tile_of_keys tile = {keys, values, scores, direct ? v + j * s->v_token : 0, k + (j + TILE) * s->k_token,
                               v + (j + TILE) * s->v_token};
    for (long panel = 0, r = 0; panel < panels; panel++, r += lanes)
      if (states[panel])
        tile_step(&tile, n, stride, width, query + r * stride, state + r * stride, largest + r, total + r, s, mask,
                  first_row + r, min(lanes, rows - r), j, states[panel]);
  }
}

typedef void (*kernel)(const char *, const char *, const char *, const uint8_t *, float, const shape *, long, long,
                       long, long, long, float *, float *);
#define KERNEL(WIDTH, STRIDE) static void kernel_##WIDTH##_##STRIDE(const char *q, const char *k, const char *v, \
    const uint8_t *mask, float scale, const shape *s, long g, long first_row, long rows, long from, long to, \
    float *state, float *scratch) { \
  stretch_of(q, k, v, mask, scale, s, g, first_row, rows, from, to, WIDTH, STRIDE, state, scratch); \
}
KERNEL(1, 128) KERNEL(2, 128) KERNEL(1, 256) KERNEL(2, 256)

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
  const long group = s->heads / s->groups, all_rows = s->tokens * group, pairs = s->batch * s->groups;
  const int width = all_rows > LANES ? 2 : 1;
  const long stride = s->size > 128 ? 256 : 128, lanes = width * LANES, block = lanes * PANELS;
  const kernel compute = width == 1 ? stride == 128 ? kernel_1_128 : kernel_1_256
                                    : stride == 128 ? kernel_2_128 : kernel_2_256;
  const long blocks = (all_rows + block - 1) / block, stretches = s->stretches, units = pairs * blocks;
  const long length = ((s->keys + stretches - 1) / stretches + TILE - 1) / TILE * TILE;
  const long state_size = min(PANELS, (all_rows + lanes - 1) / lanes) * lanes * (stride + 2);
  const long out_batch = s->tokens * s->heads * s->size * size_of(s->q_type);
  float *states = scratch + s->threads * s->scratch;
  #pragma omp parallel num_threads(s->threads)
  {
    float *own = scratch + omp_get_thread_num() * s->scratch;
    #pragma omp for schedule(dynamic)
    for (long item = 0; item < units * stretches; item++) {
      const long i = item % stretches, unit = item / stretches, b = unit % pairs / s->groups, g = unit % s->groups;
      const long first = (blocks - 1 - unit / pairs) * block, rows = min(block, all_rows - first);  // the longest first
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
      const long first = (blocks - 1 - unit / pairs) * block, rows = min(block, all_rows - first);
      finish(states + unit * stretches * state_size, stretches, state_size,
             out + unit % pairs / s->groups * out_batch, s, unit % s->groups, first, rows, stride,
             (rows + lanes - 1) / lanes * lanes);
    }
  }
}

/* A copy of CALL for each type, so that the inner loops do not ask for it. */
#define FOR_TYPE(CALL) if (type == FLOAT16) CALL(FLOAT16); else if (type == BFLOAT16) CALL(BFLOAT16); else CALL(FLOAT32)

INLINE __m256 scaled(__m256 v, __m256 scale, __m256 weight) { return _mm256_mul_ps(_mm256_mul_ps(v, scale), weight); }

INLINE void norm_row(const char *x, const char *weight, char *y, long size, float eps, int type, int weight_type) {
  __m256 squares[4] = {0};
  long i = 0;
  for (; i + 32 <= size; i += 32)
    UNROLLED (int j = 0; j < 4; j++) {
      const __m256 v = load(x, type, i + 8 * j, 8);
      squares[j] = _mm256_fmadd_ps(v, v, squares[j]);
    }
  for (; i < size; i += 8) {
    const __m256 v = load(x, type, i, size - i);
    squares[0] = _mm256_fmadd_ps(v, v, squares[0]);
  }
  float lanes[8], sum = 0;
  squares[0] = _mm256_add_ps(_mm256_add_ps(squares[0], squares[1]), _mm256_add_ps(squares[2], squares[3]));
  _mm256_storeu_ps(lanes, squares[0]);
  for (int j = 0; j < 8; j++) sum += lanes[j];
  const __m256 scale = _mm256_set1_ps(1 / __builtin_sqrtf(sum / size + eps));
  for (i = 0; i < size; i += 8) {
    const long n = size - i;
    if (n >= 8) store(y, type, i, 8, scaled(load(x, type, i, 8), scale, load(weight, weight_type, i, 8)));
    else store(y, type, i, n, scaled(load(x, type, i, n), scale, load(weight, weight_type, i, n)));
  }
}

/* y[n][size] = x / sqrt(mean(x^2) + eps) * weight, row by row */
void rms_norm(const char *x, const char *weight, char *y, long n, long size, float eps, int type, int weight_type,
              int threads) {
  const long bytes = size * size_of(type);
  #pragma omp parallel for num_threads(threads) schedule(static) if (n > 1)
  for (long row = 0; row < n; row++) {
    #define NORM(TYPE) norm_row(x + row * bytes, weight, y + row * bytes, size, eps, TYPE, weight_type)
    FOR_TYPE(NORM);
  }
}

INLINE void rotate_head(const char *x, const float *cosine, const float *sine, char *y, long size, int type) {
  const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  const __m256 signs = _mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1);
  for (long i = 0; i < size / 2; i += 8) {
    const __m256 v = load(x, type, i, 8);
    const __m256 c = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cosine + i / 2)), twice);
    const __m256 s = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(sine + i / 2)), twice);
    const __m256 turned = _mm256_mul_ps(_mm256_permute_ps(v, 0xb1), _mm256_mul_ps(s, signs));
    store(y, type, i, 8, _mm256_fmadd_ps(v, c, turned));
  }
  const long half = size / 2 * size_of(type);
  memcpy(y + half, x + half, half);
}

/* y[n][heads][size]: the pairs (2i, 2i + 1) in the first half of a head are rotated by the token's angle i. cosine and
   sine: [period][size / 4], for token % period. size is a multiple of 16; token_bytes lie between two tokens of x. */
void rotate(const char *x, const float *cosine, const float *sine, char *y, long n, long heads, long size, long period,
            long token_bytes, int type, int threads) {
  const long bytes = size * size_of(type);
  #pragma omp parallel for num_threads(threads) schedule(static) if (n > 1)
  for (long token = 0; token < n; token++)
    for (long head = 0; head < heads; head++) {
      const long angles = token % period * (size / 4);
      #define ROTATE(TYPE) rotate_head(x + token * token_bytes + head * bytes, cosine + angles, sine + angles, \
                                       y + (token * heads + head) * bytes, size, TYPE)
      FOR_TYPE(ROTATE);
    }
}

/* ---- linear layers of floats: few tokens times weights where they are, each row read once ---- */

/* Numbers 0 to 2 LANES - 1 of `at` as floats: one half and the other, or the even and the odd ones of bfloat16. */
INLINE void two(const char *at, int type, floats v[2]) {
  if (type == BFLOAT16) {
    words pairs;
    memcpy(&pairs, at, sizeof pairs);
    v[0] = (floats)(pairs << 16), v[1] = (floats)(pairs & 0xffff0000);
  } else v[0] = widened(at, type), v[1] = widened(at + LANES * size_of(type), type);
}

/* The same for the first n numbers, and zeros behind them. */
INLINE void two_of(const char *at, int type, long n, floats v[2]) {
  char part[8 * LANES] = {0};
  two(memcpy(part, at, n * size_of(type)), type, v);
}

/* The sum of the lanes. */
INLINE float total(floats v) {
#ifdef __AVX512F__
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1)));
#else
  const __m256 half = (__m256)v;
#endif
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* to[t][r] = x[t] times row r of w, for `tokens` rows of x as floats in the order of `two`, and `rows` rows of w. */
INLINE void few_rows(const float *x, long padded, const char *w, long k, int type, int rows, int tokens, float *to) {
  const long step = 2 * LANES, bytes = k * size_of(type), whole = k / step * step, near = whole - AHEAD / size_of(type);
  floats sum[4][MANY], v[4][2];
  UNROLLED (int r = 0; r < rows; r++)
    UNROLLED (int t = 0; t < tokens; t++) sum[r][t] = (floats){0};
  #define ADD(READ) \
    UNROLLED (int r = 0; r < rows; r++) READ; \
    UNROLLED (int t = 0; t < tokens; t++) \
      UNROLLED (int i = 0; i < 2; i++) { \
        const floats number = *(const floats *)(x + t * padded + k0 + i * LANES); \
        UNROLLED (int r = 0; r < rows; r++) sum[r][t] += v[r][i] * number; \
      }
  long k0 = 0;
  for (; k0 < whole; k0 += step) {
    const char *at = w + k0 * size_of(type), *ahead = at + AHEAD + (k0 < near ? 0 : (rows - 1) * bytes);
    UNROLLED (int r = 0; r < rows; r++)
      UNROLLED (int i = 0; i < step * size_of(type); i += 64) _mm_prefetch(ahead + r * bytes + i, _MM_HINT_T1);
    ADD(two(at + r * bytes, type, v[r]))
  }
  if (k0 < k) {
    ADD(two_of(w + r * bytes + k0 * size_of(type), type, k - k0, v[r]))
  }
  UNROLLED (int r = 0; r < rows; r++)
    UNROLLED (int t = 0; t < tokens; t++) to[8 * t + r] = total(sum[r][t]);
}

/* Eight rows of w, or `rows` of them at the end, for all tokens. */
INLINE void linear_block(const float *x, long padded, const char *w, const char *bias, char *y, long n, long k,
                         long out, long row, int type) {
  const long bytes = k * size_of(type), rows = min(out - row, 8);
  float to[8 * MANY];
  for (long from = 0; from < n; from += MANY) {
    const long left = min(n - from, MANY);
    #define ROWS(TOKENS, EACH) for (; r + EACH <= rows; r += EACH) \
      few_rows(x + from * padded, padded, w + (row + r) * bytes, k, type, EACH, TOKENS, to + r);
    long r = 0;
    if (left == 1) { ROWS(1, 4) ROWS(1, 1) }
    else if (left == 2) { ROWS(2, 4) ROWS(2, 1) }
    else if (left > 4) { ROWS(MANY, 2) ROWS(MANY, 1) }
    else if (LANES == 16) { ROWS(4, 4) ROWS(4, 1) }
    else { ROWS(4, 2) ROWS(4, 1) }
    for (long t = 0; t < left; t++) {
      __m256 v = _mm256_loadu_ps(to + 8 * t);
      if (bias) v = _mm256_add_ps(v, load(bias, type, row, rows));
      store(y, type, (from + t) * out + row, rows, v);
    }
  }
}

/* y[n][out] = x[n][k] w^T + bias, for w[out][k]; all of `type`. scratch: floats, k rounded up to 32 for each of
   min(n, PANEL) tokens, rounded up to 8. */
void linear(const char *x, const char *w, const char *bias, char *y, float *scratch, long n, long k, long out, int type,
            int threads) {
  const long step = 2 * LANES, padded = (k + step - 1) / step * step, bytes = size_of(type);
  #pragma omp parallel num_threads(threads)
  for (long first = 0; first < n; first += PANEL) {
    const long tokens = min(n - first, PANEL);
    #pragma omp for schedule(static)
    for (long t = 0; t < (tokens + MANY - 1) / MANY * MANY; t++)
      for (long i = 0; i < padded; i += step)
        two_of(x + ((first + t) * k + i) * bytes, type, t < tokens ? min(k - i, step) : 0,
               (floats *)(scratch + t * padded + i));
    #pragma omp for schedule(guided)
    for (long block = 0; block < (out + 7) / 8; block++) {
      #define LINEAR(TYPE) \
        linear_block(scratch, padded, w, bias, y + first * out * bytes, tokens, k, out, 8 * block, TYPE)
      FOR_TYPE(LINEAR);
    }
  }
}
"""


def source(instructions: str) -> str:
    """Return the C file; the compiler's options alone tell AVX512 from AVX2."""
    return f"{HEAD}enum {{ TILE = {TILE}, PANEL = {PANEL} }};\n{BODY}{BLOCKS}"
