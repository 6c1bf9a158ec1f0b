"""The C source of `inference_cpu`: `source(instructions)` returns the whole file, for AVX512 or AVX2.

Attention and whole blocks have files of their own, `attention_cpu_source` and `blocks_cpu_source`.
"""

from .attention_cpu_source import BODY as ATTENTION
from .attention_cpu_source import TILE
from .blocks_cpu_source import BODY as BLOCKS
from .quantization_cpu_source import HEAD

PANEL = 128  # tokens of a linear layer that are widened at a time
CHUNK = 256  # floats, or pairs, of a token's inputs that are multiplied at a time

VECTORS = r"""
enum { MANY = LANES / 2 };  // tokens that a weight is multiplied with at a time
#define UNROLLED _Pragma("GCC unroll 16") for
#define KEEP(v) __asm__("" : "+v"(v))  // in a register: GCC would read it from memory for each use
#ifdef __AVX512BF16__
enum { PAIRED = 1 };  // whether bfloat16 is multiplied in pairs
#else
enum { PAIRED = 0 };
#endif

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

/* sum + a * b, lane by lane; for pairs of bfloat16 in the place of floats, + both products of their numbers. */
INLINE floats plus(floats sum, floats a, floats b, int pairs) {
#ifdef __AVX512BF16__
  if (pairs) return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + a * b;
}
"""

LAYERS = r"""
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

/* How many vectors hold 2 LANES numbers of this type. */
INLINE int vectors_of(int type) { return PAIRED && type == BFLOAT16 ? 1 : 2; }

/* Numbers 0 to 2 LANES - 1 of `at`: as pairs, or as floats, one half and the other, or the even and the odd ones of
   bfloat16. */
INLINE void two(const char *at, int type, floats v[2]) {
  if (vectors_of(type) == 1) memcpy(v, at, sizeof *v);
  else if (type == BFLOAT16) {
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

/* sums[r][t] += x[t] times row r of w, lane by lane: `tokens` rows of x in the order of `two`, `rows` rows of w, n
   numbers of each. Weights are prefetched `ahead` bytes apart, from number `near` on `jump` bytes more. */
INLINE void few_rows(const float *x, long padded, const char *w, long bytes, long n, int type, int rows, int tokens,
                     long ahead, long near, long jump, floats *sums) {
  const long step = 2 * LANES, whole = n / step * step;
  const int vectors = vectors_of(type);
  floats sum[4][MANY], v[4][2];
  UNROLLED (int r = 0; r < rows; r++)
    UNROLLED (int t = 0; t < tokens; t++) sum[r][t] = sums[r * MANY + t];
  #define ADD(READ) \
    UNROLLED (int r = 0; r < rows; r++) READ; \
    UNROLLED (int t = 0; t < tokens; t++) \
      UNROLLED (int i = 0; i < vectors; i++) { \
        floats number = *(const floats *)(x + t * padded + k * vectors / 2 + i * LANES); \
        if (vectors == 1 || tokens > 4) KEEP(number); \
        UNROLLED (int r = 0; r < rows; r++) sum[r][t] = plus(sum[r][t], v[r][i], number, vectors == 1); \
      }
  long k = 0;
  for (; k < whole; k += step) {
    const char *at = w + k * size_of(type), *next = at + ahead + (k < near ? 0 : jump);
    UNROLLED (int r = 0; r < rows; r++)
      UNROLLED (int i = 0; i < step * size_of(type); i += 64) _mm_prefetch(next + r * bytes + i, _MM_HINT_T1);
    ADD(two(at + r * bytes, type, v[r]))
  }
  if (k < n) {
    ADD(two_of(w + r * bytes + k * size_of(type), type, n - k, v[r]))
  }
  UNROLLED (int r = 0; r < rows; r++)
    UNROLLED (int t = 0; t < tokens; t++) sums[r * MANY + t] = sum[r][t];
}

/* Eight rows of w, or fewer at the end, for all tokens. The inputs of 8, or of 4 in pairs, are multiplied in chunks, so
   that they come from the first-level cache for all rows but the first. */
INLINE void linear_block(const float *x, long padded, const char *w, const char *bias, char *y, long n, long k,
                         long out, long row, int type) {
  const long bytes = k * size_of(type), rows = min(out - row, 8), vectors = vectors_of(type);
  for (long from = 0; from < n; from += MANY) {
    const long left = min(n - from, MANY), chunk = left > (vectors == 2 ? 4 : 2) ? CHUNK * 2 / vectors : k;
    floats sums[8 * MANY] = {0};
    for (long at = 0; at < k; at += chunk) {
      const long size = min(chunk, k - at), ahead = chunk == k ? AHEAD : chunk * size_of(type);
      #define ROWS(TOKENS, EACH) for (; r + EACH <= rows; r += EACH) \
        few_rows(x + from * padded + at * vectors / 2, padded, w + (row + r) * bytes + at * size_of(type), \
                 bytes, size, type, EACH, TOKENS, ahead, k - at - ahead / size_of(type), \
                 ((chunk == k ? EACH : 8) - 1) * bytes, sums + r * MANY);
      long r = 0;
      if (left == 1) { ROWS(1, 4) ROWS(1, 1) }
      else if (left == 2) { ROWS(2, 4) ROWS(2, 1) }
      else if (left > 4) { ROWS(MANY, 2) ROWS(MANY, 1) }
      else if (LANES == 16) { ROWS(4, 4) ROWS(4, 1) }
      else { ROWS(4, 2) ROWS(4, 1) }
    }
    for (long t = 0; t < left; t++) {
      float to[8] = {0};
      for (long r = 0; r < rows; r++) to[r] = total(sums[r * MANY + t]);
      __m256 v = _mm256_loadu_ps(to);
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
               (floats *)(scratch + t * padded + i / 2 * vectors_of(type)));
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
    return f"{HEAD}enum {{ TILE = {TILE}, PANEL = {PANEL}, CHUNK = {CHUNK} }};\n{VECTORS}{ATTENTION}{LAYERS}{BLOCKS}"
