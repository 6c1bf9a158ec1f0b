"""The C source of the CPU kernels: `source(instructions)` returns the whole file, for AVX512-VNNI or AVX2.

Weight layout: int8 [out / 32, in / step, 128], padded to whole blocks of 32 rows and 128 inputs. A step is 4 inputs
(int8) or 8 (int4) of 32 rows: byte 4 * row + input holds q + 128, or q + 8 with the next four inputs in the high
nibble. The values are unsigned because the dot product instruction requires it; sums start at -128 or -8 times the sum
of the group's inputs to cancel the offset (AVX2 without VNNI restores signed int8). The layout is the same for one
token and many, and for both instruction sets.

Only the tile, a group of inputs times 32 rows, differs: hand-written 512-bit assembly, or 256-bit intrinsics and int8
prompts of their own (`quantization_cpu_avx2`).
"""

from typing import List

import torch

from .quantization_cpu_avx2 import TOKENS
from .quantization_cpu_avx2 import source as avx2_source

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # dtypes as the C code numbers them
TILES = {"avx512": (1, 2, 4, 8, 12), "avx2": TOKENS}  # tokens per tile, as many as the registers hold
WIDEST = max(max(tokens) for tokens in TILES.values())
PANEL, PANEL_FLOAT32 = 516, 128  # tokens that are multiplied at a time: multiples of those of all tiles
AHEAD = 8192  # prefetch distance in bytes of weights: a sixth faster than hardware prefetching alone


def one_token(bits: int) -> List[str]:
    """Four steps for one token, which memory is to bound: few instructions, and none to prefetch."""
    steps = []
    for i in range(4):
        for half in (0, 1):
            w, low, high = f"{128 * i + 64 * half}(%[w])", f"%%zmm{24 + half}", f"%%zmm{26 + half}"
            x = [f"{32 // bits * i + 4 * quad}(%[x])%{{1to16%}}" for quad in (0, 1)]
            if bits == 8:
                steps.append(f"vmovdqu64 {w}, {low}; vpdpbusd {x[0]}, {low}, %%zmm{16 * (i % 2) + half}")
            else:
                steps.append(f"vpandd {w}, %%zmm31, {low}; vpdpbusd {x[0]}, {low}, %%zmm{half}")
                steps.append(f"vpsrld $4, {w}, {high}; vpandd %%zmm31, {high}, {high}")
                steps.append(f"vpdpbusd {x[1]}, {high}, %%zmm{16 + half}")
    return steps


def many_tokens(bits: int, tokens: int, steps: int) -> List[str]:
    """So many steps: each half of the weights is read once, then multiplied with each token."""
    level, ahead = (1, AHEAD // 2) if (bits, tokens) == (4, 8) else (0, AHEAD)  # 4% faster; for 4 tokens it depends
    code = []
    for i in range(steps):
        for half in (0, 1):
            at = 128 * i + 64 * half
            code.append(f"prefetcht{level} {ahead + at}(%[w]); vmovdqu64 {at}(%[w]), %%zmm{24 + half}")
        for quad in range(8 // bits):
            weights = 24
            if bits == 4:
                weights = 26
                if quad:
                    code += [f"vpsrld $4, %%zmm{24 + half}, %%zmm{24 + half}" for half in (0, 1)]
                code += [f"vpandd %%zmm31, %%zmm{24 + half}, %%zmm{26 + half}" for half in (0, 1)]
            for t in range(tokens):
                x = f"{4 * ((8 // bits * i + quad) * tokens + t)}(%[x])"
                if tokens > 4:
                    code.append(f"vpbroadcastd {x}, %%zmm{28 + t % 2}")
                    x = f"%%zmm{28 + t % 2}"
                else:
                    x += "%{1to16%}"
                code += [f"vpdpbusd {x}, %%zmm{weights + half}, %%zmm{2 * t + half}" for half in (0, 1)]
    return code


def tile_source(bits: int, tokens: int) -> str:
    """A group of inputs times 32 rows for `tokens` tokens, in assembly: GCC spills registers with intrinsics.

    zmm(2t), zmm(2t + 1): the sums of token t with rows 0-15 and 16-31. x: [input / 4][token][4] int8. With one token
    half of the products have sums of their own, from zmm16 on: a sum waits for the one before it.
    """
    begin = [
        f"vpbroadcastd {4 * t}(%[start]), %%zmm{2 * t}; vmovdqa64 %%zmm{2 * t}, %%zmm{2 * t + 1}" for t in range(tokens)
    ]
    steps, end = 4 if tokens == 1 else 2 if tokens <= 4 else 1, []
    step = one_token(bits) if tokens == 1 else many_tokens(bits, tokens, steps)
    if tokens == 1:
        begin += [f"vpxord %%zmm{i}, %%zmm{i}, %%zmm{i}" for i in (16, 17)]
        end += [f"vpaddd %%zmm{16 + i}, %%zmm{i}, %%zmm{i}" for i in (0, 1)]
    end += ["vmovups (%[ws]), %%zmm26", "vmovups 64(%[ws]), %%zmm27"]
    for t in range(tokens):  # sums += dot * x_scale * weight_scale
        end.append(f"vbroadcastss {4 * t}(%[xs]), %%zmm30")
        for half in (0, 1):
            end.append(f"vmulps %%zmm{26 + half}, %%zmm30, %%zmm{28 + half}")
            end.append(f"vcvtdq2ps %%zmm{2 * t + half}, %%zmm{2 * t + half}")
            end.append(f"vfmadd213ps {128 * t + 64 * half}(%[sums]), %%zmm{28 + half}, %%zmm{2 * t + half}")
            end.append(f"vmovups %%zmm{2 * t + half}, {128 * t + 64 * half}(%[sums])")
    advance = [f"add ${128 * steps}, %[w]; add ${32 // bits * tokens * steps}, %[x]; sub ${steps}, %[steps]; jnz 1b"]
    asm = "\n".join(
        f'    "{line}\\n"' for line in ["vpbroadcastd %[mask], %%zmm31", *begin, "1:", *step, *advance, *end]
    )
    clobbers = ", ".join(f'"zmm{i}"' for i in range(32))
    return f"""
static void tile_{bits}_{tokens}(const uint8_t *w, const int8_t *x, const int32_t *start, const float *xs,
                                 const float *ws, float *sums, long steps) {{
  static const int32_t mask = 0x0f0f0f0f;
  asm volatile(
{asm}
    : [w] "+r"(w), [x] "+r"(x), [steps] "+r"(steps)
    : [start] "r"(start), [xs] "r"(xs), [ws] "r"(ws), [sums] "r"(sums), [mask] "m"(mask)
    : "memory", "cc", {clobbers});
}}
"""


HEAD = (
    f"enum {{ AHEAD = {AHEAD} }};"
    + r"""
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512VNNI__
enum { LANES = 16, WIDEST_EXACT = 8 };
#else
enum { LANES = 8, WIDEST_EXACT = 4 };
#endif
#define INLINE static inline __attribute__((always_inline))
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t word __attribute__((aligned(1), may_alias));

enum { FLOAT32, FLOAT16, BFLOAT16 };
typedef void (*tile)(const uint8_t *, const int8_t *, const int32_t *, const float *, const float *, float *, long);

static inline long min(long a, long b) { return a < b ? a : b; }
static inline long size_of(int type) { return type == FLOAT32 ? 4 : 2; }

/* The same number, or pair, in all lanes: as integers, because vbroadcastss takes a multiplier's turn in Zen 4. */
INLINE floats broadcast(const float *a) {
#ifdef __AVX512F__
  return (floats)_mm512_set1_epi32(*(const word *)a);
#else
  return (floats)_mm256_set1_ps(*a);
#endif
}

/* p[i] to p[i + 7] as floats, zeros after the first n. */
static inline __m256 load(const void *p, int type, long i, long n) {
  char part[32] = {0};
  const char *at = (const char *)p + i * size_of(type);
  if (n < 8) at = memcpy(part, at, n > 0 ? n * size_of(type) : 0);
  if (type == FLOAT32) return _mm256_loadu_ps((const float *)at);
  __m128i half = _mm_loadu_si128((const __m128i *)at);
  if (type == FLOAT16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline __m128i to_float16(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* bfloat16 in the low half of each lane, rounded to nearest even; nan stays nan. */
static inline __m256i to_bfloat16(__m256 v) {
  __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc0), nan);
}

static inline __m256 rounded(__m256 v, int type) {
  if (type == FLOAT16) return _mm256_cvtph_ps(to_float16(v));
  return type == FLOAT32 ? v : _mm256_castsi256_ps(_mm256_slli_epi32(to_bfloat16(v), 16));
}

static inline void store(void *p, int type, long i, long n, __m256 v) {
  char part[32];
  if (type == FLOAT32) _mm256_storeu_ps((float *)part, v);
  else if (type == FLOAT16) _mm_storeu_si128((__m128i *)part, to_float16(v));
  else {
    __m256i bits = to_bfloat16(v);
    bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    _mm_storeu_si128((__m128i *)part, _mm256_castsi256_si128(bits));
  }
  if (n > 0) memcpy((char *)p + i * size_of(type), part, min(n, 8) * size_of(type));
}

/* 8 x 8 words: rows become columns. */
static inline void transpose(__m256 a[8]) {
  __m256 b[8], c[8];
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      c[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
      c[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x20);
    a[i + 4] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x31);
  }
}

/* The block's scales, transposed: [out][groups] -> s[groups][32]. */
static inline void scales_of(const void *scale, int type, long block, long out, long groups, float *s) {
  for (long r = 0; r < 32; r += 8) {
    const long row = block * 32 + r;
    if (groups == 1) _mm256_storeu_ps(s + r, load(scale, type, row, out - row));
    for (long g = 0; g < groups && groups > 1; g += 8) {
      __m256 a[8];
      for (long i = 0; i < 8; i++)
        a[i] = row + i < out ? load(scale, type, (row + i) * groups + g, groups - g) : _mm256_setzero_ps();
      transpose(a);
      for (int i = 0; i < min(8, groups - g); i++) _mm256_storeu_ps(s + (g + i) * 32 + r, a[i]);
    }
  }
}

/* The sums [tokens][32] of a block, plus bias, to y[from + t][out]. */
INLINE void write_block(const float *sums, const void *bias, int stype, void *y, int ytype, long from, long tokens,
                        long out, long block) {
  for (long t = 0; t < tokens; t++)
    for (long r = 0; r < 32; r += 8) {
      const long row = block * 32 + r;
      __m256 v = _mm256_loadu_ps(sums + 32 * t + r);
      if (bias) v = _mm256_add_ps(v, load(bias, stype, row, out - row));
      store(y, ytype, (from + t) * out + row, out - row, v);
    }
}

/* Quantize one token to int8 by groups: q = round(x / scale), scale = max|x| / 127, start = -offset * sum(q). */
static void quantize_token(const void *x, int type, long k, long padded, long group, int offset, long stride, int8_t *q,
                           float *scale, int32_t *start) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (long g = 0; g * group < padded; g++) {
    __m256 v[16], largest = _mm256_setzero_ps(), nan = _mm256_setzero_ps();
    long parts = group / 8;
    for (long i = 0; i < parts; i++) {
      long at = g * group + 8 * i;
      v[i] = x ? load(x, type, at, k - at) : _mm256_setzero_ps();
      largest = _mm256_max_ps(largest, _mm256_and_ps(v[i], magnitude));
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(v[i], v[i], _CMP_UNORD_Q));
    }
    float lanes[8], s = 0;
    _mm256_storeu_ps(lanes, largest);
    for (int i = 0; i < 8; i++) s = lanes[i] > s ? lanes[i] : s;
    s = _mm256_movemask_ps(nan) ? __builtin_nanf("") : s / 127;
    const int usable = s > 1e-37f && s < __builtin_inff();  /* nan and inf become nan below */
    __m256i total = _mm256_setzero_si256();
    for (long i = 0; i < parts; i++) {
      __m256i rounded = _mm256_cvtps_epi32(_mm256_div_ps(v[i], _mm256_set1_ps(s)));
      if (!usable) rounded = _mm256_setzero_si256();
      total = _mm256_add_epi32(total, rounded);
      __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
      int32_t quads[4];
      _mm_storeu_si128((__m128i *)quads, _mm_packs_epi16(narrow, narrow));
      for (int j = 0; j < 2; j++) memcpy(q + (g * group / 4 + 2 * i + j) * 4 * stride, quads + j, 4);
    }
    int32_t sums[8], sum = 0;
    _mm256_storeu_si256((__m256i *)sums, total);
    for (int i = 0; i < 8; i++) sum += sums[i];
    scale[g * stride] = s - s == 0 ? s : __builtin_nanf("");
    start[g * stride] = -offset * sum;
  }
}
"""
)

WIDTH = r"""
int omp_get_thread_num(void);

/* The number of tokens in the smallest tile that holds `tokens`. */
static int width(long tokens) { return tokens > 8 ? WIDEST : tokens > 4 ? min(8, WIDEST) : tokens > 2 ? 4 : tokens; }
"""

BODY = r"""
/* `linear` for at most PANEL tokens. */
static void panel(const void *x, void *y, const uint8_t *w, const void *scale, const void *bias, char *scratch, long n,
                  long k, long out, long groups, long group, int bits, int xtype, int stype, int threads) {
  long padded = (k + 127) / 128 * 128, ng = padded / group, blocks = (out + 31) / 32;
  long tiles = (n + WIDEST - 1) / WIDEST, room = n + WIDEST;
  int8_t *q = (int8_t *)scratch + threads * groups * 128;
  float *xs = (float *)(q + room * padded);
  int32_t *start = (int32_t *)(xs + room * ng);
  #pragma omp parallel for num_threads(threads) schedule(static) if (n > 1)
  for (long token = 0; token < WIDEST * (tiles - 1) + width(n - WIDEST * (tiles - 1)); token++) {
    long from = token / WIDEST * WIDEST, t = token - from, stride = width(n - from);
    quantize_token(token < n ? (const char *)x + token * k * size_of(xtype) : 0, xtype, k, padded, group,
                   bits == 8 ? OFFSET_8 : OFFSET_4, stride, q + from * padded + 4 * t, xs + from * ng + t,
                   start + from * ng + t);
  }
  const long block_bytes = padded * 4 * bits, group_bytes = group * 4 * bits;
  /* guided: long runs of memory per thread, and all threads finish together */
  #pragma omp parallel for num_threads(threads) schedule(guided)
  for (long block = 0; block < blocks; block++) {
    float *ws = (float *)scratch + omp_get_thread_num() * groups * 32, sums[WIDEST * 32];
    scales_of(scale, stype, block, out, groups, ws);
    for (long from = 0; from < n; from += WIDEST) {
      int tokens = width(n - from);
      tile product = bits == 8 ? tiles_8[tokens] : tiles_4[tokens];
      memset(sums, 0, sizeof sums);
      for (long g = 0; g < ng; g++)
        product(w + block * block_bytes + g * group_bytes, q + from * padded + g * group * tokens,
                start + (from * ng + g * tokens), xs + (from * ng + g * tokens),
                ws + (groups == 1 ? 0 : min(g * group * groups / k, groups - 1) * 32), sums, group_bytes / 128);
      write_block(sums, bias, stype, y, xtype, from, min(tokens, n - from), out, block);
    }
  }
}

/* How many of n tokens to multiply at a time, at most `most`: a weight meets the inputs of all of them, which should
   come from a cache. */
static long at_a_time(long n, long most, long multiple) {
  const long panels = n > most ? (n + most - 1) / most : 1, each = (n + panels - 1) / panels;
  return (each + multiple - 1) / multiple * multiple;
}

/* y[n][out] = x[n][k] times the weight, plus bias, which has scale's type. groups: weight scales a row; group: inputs
   that share an activation scale. scratch begins with a table of scales, [groups][32], for each thread: the stack of a
   thread is too small for one. */
void linear(const void *x, void *y, const uint8_t *w, const void *scale, const void *bias, char *scratch, long n,
            long k, long out, long groups, long group, int bits, int xtype, int stype, int threads) {
#ifdef PROMPT
  if (bits == 8 && n >= PROMPT) {
    prompt(x, y, w, scale, bias, scratch, n, k, out, groups, group, xtype, stype, threads);
    return;
  }
#endif
  const long each = at_a_time(n, PANEL, WIDEST), bytes = size_of(xtype);
  for (long first = 0; first < n; first += each)
    panel((const char *)x + first * k * bytes, (char *)y + first * out * bytes, w, scale, bias, scratch,
          min(each, n - first), k, out, groups, group, bits, xtype, stype, threads);
}

/* Input number `input` of LANES rows, as floats. Bits within the mantissa stay where they are, under the exponent for
   which the lowest of them counts 1: fewer instructions than to shift and convert them. */
static inline floats weight(words v, int bits, int input) {
  const int shift = bits == 4 ? 8 * (input & 3) + 4 * (input >> 2) : 8 * input, zero = bits == 4 ? 8 : 128;
#ifdef __AVX512VNNI__
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  if (bits == 4 && (shift == 0 || shift > 16)) return (floats)_mm512_permutexvar_ps((__m512i)(v >> shift), table);
#endif
  if (shift + bits > 23) return __builtin_convertvector((ints)(v >> shift & (2 * zero - 1)) - zero, floats);
  const uint32_t mask = (2 * zero - 1) << shift, exponent = (127 + 23 - shift) << 23;
  return (floats)(v & mask | exponent) - (float)((1 << (23 - shift)) + zero);
}

/* 32 rows for n tokens; n is a constant in each inlined copy. One or two tokens have more sums than rows and tokens,
   so that few additions wait for each other. */
INLINE void exact(const float *x, const uint8_t *w, const float *ws, long padded, long groups, long per_group, int bits,
                  int n, float *sums) {
  const int inputs = bits == 4 ? 8 : 4, parts = n == 1 ? 4 : n == 2 ? 2 : 1;
  for (int row = 0; row < 32; row += 2 * LANES) {  // two registers per token
    const uint8_t *at = w + 4 * row;
    floats total[WIDEST_EXACT][2] = {0};
    for (long g = 0; g < groups; g++) {
      floats sum[WIDEST_EXACT][4][2] = {0};
      long to = groups == 1 ? padded : (g + 1) * per_group;
      for (long k = g * per_group; k < to; k += inputs, at += 128) {
        const words first = *(const words *)at, second = *(const words *)(at + 4 * LANES);
        for (int i = 0; i < 8 * LANES; i += 64) _mm_prefetch((const char *)at + i + AHEAD, _MM_HINT_T1);
        #pragma GCC unroll 8
        for (int i = 0; i < inputs; i++) {
          const floats f = weight(first, bits, i), s = weight(second, bits, i);
          #pragma GCC unroll 8
          for (int t = 0; t < n; t++) {
            const floats number = broadcast(x + t * padded + k + i);
            sum[t][i % parts][0] += f * number;
            sum[t][i % parts][1] += s * number;
          }
        }
      }
      #pragma GCC unroll 8
      for (int t = 0; t < n; t++)
        for (int p = 0; p < 2; p++) {
          for (int i = 1; i < parts; i++) sum[t][0][p] += sum[t][i][p];
          total[t][p] += sum[t][0][p] * *(const floats *)(ws + 32 * g + row + LANES * p);
        }
    }
    for (int t = 0; t < n; t++)
      for (int p = 0; p < 2; p++) *(floats *)(sums + 32 * t + row + LANES * p) = total[t][p];
  }
}

/* `linear_float32` for at most PANEL_FLOAT32 tokens. Its tiles read whole groups of 128 inputs, and from 3 tokens on a
   multiple of 8 tokens: scratch has room for x padded to that, behind the tables of scales. */
static void panel_float32(const float *x, float *y, const uint8_t *w, const void *scale, const void *bias,
                          float *scratch, long n, long k, long out, long groups, int bits, int stype, int threads) {
  long padded = (k + 127) / 128 * 128, blocks = (out + 31) / 32, per_group = k / groups;
  const long rows = n > 2 ? (n + 7) / 8 * 8 : n;
  if (padded > k || rows > n) {
    float *inputs = scratch + threads * groups * 32;
    #pragma omp parallel for num_threads(threads) schedule(static) if (n > 2)
    for (long t = 0; t < rows; t++) {
      const long given = t < n ? k : 0;
      if (given) memcpy(inputs + t * padded, x + t * k, given * sizeof *x);
      memset(inputs + t * padded + given, 0, (padded - given) * sizeof *x);
    }
    x = inputs;
  }
  #pragma omp parallel for num_threads(threads) schedule(guided)
  for (long block = 0; block < blocks; block++) {
    float *ws = scratch + omp_get_thread_num() * groups * 32, sums[WIDEST_EXACT * 32];
    const uint8_t *at = w + block * padded * 4 * bits;
    scales_of(scale, stype, block, out, groups, ws);
    for (long from = 0; from < n; from += WIDEST_EXACT) {
      const float *tokens = x + from * padded;
      const long left = min(n - from, WIDEST_EXACT);
      #define EXACT(N) { if (bits == 4) exact(tokens, at, ws, padded, groups, per_group, 4, N, sums); \
                         else exact(tokens, at, ws, padded, groups, per_group, 8, N, sums); }
      if (left > 4) EXACT(WIDEST_EXACT) else if (left > 2) EXACT(4) else if (left > 1) EXACT(2) else EXACT(1)
      write_block(sums, bias, stype, y, FLOAT32, from, left, out, block);
    }
  }
}

/* The float32 version. */
void linear_float32(const float *x, float *y, const uint8_t *w, const void *scale, const void *bias, float *scratch,
                    long n, long k, long out, long groups, int bits, int stype, int threads) {
  const long each = at_a_time(n, PANEL_FLOAT32, 8);
  for (long first = 0; first < n; first += each)
    panel_float32(x + first * k, y + first * out, w, scale, bias, scratch, min(each, n - first), k, out, groups, bits,
                  stype, threads);
}
"""

PREPARE = r"""
typedef uint32_t eight __attribute__((vector_size(32), aligned(1), may_alias));

/* A step of 8 rows, from the released packing to the layout. */
static inline eight to_step(eight v, int bits) {
  if (bits == 8) return v ^ 0x80808080;
  v ^= 0x88888888;
  const eight even = v >> 4 & 0x0f0f0f0f, odd = v & 0x0f0f0f0f;                /* bytes: inputs 0 2 4 6, 1 3 5 7 */
  const eight outer = (even & 0xff00ff) | (odd & 0xff00ff) << 8;               /* 0 1 4 5 */
  const eight inner = (even >> 8 & 0xff00ff) | (odd & 0xff00ff00);             /* 2 3 6 7 */
  return (outer & 0xffff) | inner << 16 | outer >> 12 & 0xffff0 | (inner & 0xffff0000) << 4;
}

/* The inverse of to_step. */
static inline eight from_step(eight v, int bits) {
  if (bits == 8) return v ^ 0x80808080;
  v ^= 0x88888888;
  const eight low = v & 0x0f0f0f0f, high = v >> 4 & 0x0f0f0f0f;                /* bytes: inputs 0 1 2 3, 4 5 6 7 */
  const eight first = low << 4 | low >> 8, second = high << 4 | high >> 8;     /* bytes 0 and 2: inputs 01 and 23 */
  return (first & 0xff) | (first >> 8 & 0xff00) | (second & 0xff) << 16 | (second << 8 & 0xff000000);
}

/* The layout of packed[out][bytes], or with `inverse` the released packing of the layout. */
void lay_out(uint8_t *packed, uint8_t *layout, long out, long bytes, int bits, int inverse, int threads) {
  const long padded = (bytes + 16 * bits - 1) / (16 * bits) * (16 * bits);
  #pragma omp parallel for num_threads(threads) schedule(guided)
  for (long block = 0; block < (out + 31) / 32; block++)
    for (long at = 0; at < padded; at += 64)
      for (long part = 0; part < 8; part++) {  /* 8 rows times 32 bytes */
        const long row = block * 32 + part / 2 * 8, from = at + part % 2 * 32, size = min(bytes - from, 32);
        uint8_t *steps = layout + block * padded * 32 + from * 32 + part / 2 * 32;
        eight v[8];
        for (long i = 0; i < 8; i++) {
          if (inverse) v[i] = from_step(*(eight *)(steps + 128 * i), bits);
          else if (row + i < out && size == 32) v[i] = *(const eight *)(packed + (row + i) * bytes + from);
          else {
            v[i] = (eight){0};
            if (row + i < out && size > 0) memcpy(v + i, packed + (row + i) * bytes + from, size);
          }
        }
        transpose((__m256 *)v);
        for (long i = 0; i < 8; i++) {
          uint8_t *to = packed + (row + i) * bytes + from;
          if (!inverse) *(eight *)(steps + 128 * i) = to_step(v[i], bits);
          else if (row + i < out && size == 32) *(eight *)to = v[i];
          else if (row + i < out && size > 0) memcpy(to, v + i, size);
        }
      }
}

/* The largest magnitude of n numbers in all lanes, by its bits: inf and nan count as larger than any other. */
INLINE __m256 largest(const char *w, int type, long n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (long i = 0; i < n; i += 8)
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(load(w, type, i, n - i)), magnitude));
  most = _mm256_max_epi32(most, _mm256_permute2x128_si256(most, most, 1));
  most = _mm256_max_epi32(most, _mm256_shuffle_epi32(most, 0x4e));
  return _mm256_castsi256_ps(_mm256_max_epi32(most, _mm256_shuffle_epi32(most, 0xb1)));
}

/* n <= 16 weights as int8 or int4, packed. */
INLINE void quantize_part(const char *w, uint8_t *packed, long n, __m256 scale, int bits, int type) {
  const int limit = bits == 8 ? 127 : 7;
  __m256i q[2];
  for (int i = 0; i < 2; i++)
    q[i] = _mm256_cvtps_epi32(rounded(_mm256_div_ps(load(w, type, 8 * i, n - 8 * i), scale), type));
  q[0] = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(q[0]), _mm256_extracti128_si256(q[0], 1));
  bytes = _mm_max_epi8(_mm_min_epi8(bytes, _mm_set1_epi8(limit)), _mm_set1_epi8(-limit));
  if (bits == 4) {  /* the even column in the high nibble */
    bytes = _mm_maddubs_epi16(_mm_and_si128(bytes, _mm_set1_epi8(15)), _mm_set1_epi16(0x0110));
    bytes = _mm_packus_epi16(bytes, bytes);
  }
  memcpy(packed, &bytes, n * bits / 8);
}

INLINE void quantize_rows(const char *w, uint8_t *packed, void *scale, long rows, long group, int bits, int type,
                          int threads) {
  #pragma omp parallel for num_threads(threads) schedule(guided)
  for (long row = 0; row < rows; row++) {
    const char *from = w + row * group * size_of(type);
    uint8_t *to = packed + row * group * bits / 8;
    __m256 s = rounded(_mm256_div_ps(largest(from, type, group), _mm256_set1_ps(bits == 8 ? 127 : 7)), type);
    store(scale, type, row, 1, s);
    if (_mm256_cvtss_f32(s) == 0) s = _mm256_set1_ps(1);
    long i = 0;
    for (; i + 16 <= group; i += 16) quantize_part(from + i * size_of(type), to + i * bits / 8, 16, s, bits, type);
    if (i < group) quantize_part(from + i * size_of(type), to + i * bits / 8, group - i, s, bits, type);
  }
}

/* Each row of w[rows][group] rounded to the released packing, with its scale: `quantize_weight`, bit for bit. */
void quantize(const char *w, uint8_t *packed, void *scale, long rows, long group, int bits, int type, int threads) {
  #define QUANTIZE(BITS, TYPE) if (bits == BITS && type == TYPE) \
    quantize_rows(w, packed, scale, rows, group, BITS, TYPE, threads);
  QUANTIZE(4, FLOAT32) QUANTIZE(4, FLOAT16) QUANTIZE(4, BFLOAT16)
  QUANTIZE(8, FLOAT32) QUANTIZE(8, FLOAT16) QUANTIZE(8, BFLOAT16)
}
"""


def source(instructions: str) -> str:
    """Return the C file for "avx512" or "avx2": the tiles between the shared parts."""
    sizes = f"WIDEST = {max(TILES[instructions])}, PANEL = {PANEL}, PANEL_FLOAT32 = {PANEL_FLOAT32}"
    tiles = f"enum {{ {sizes} }};\n{WIDTH}"
    if instructions == "avx2":
        tiles += avx2_source()
    else:
        tiles += "enum { OFFSET_4 = 8, OFFSET_8 = 128 };\n"
        tiles += "".join(tile_source(bits, tokens) for bits in (4, 8) for tokens in TILES["avx512"])
    for bits in (4, 8):
        entries = ", ".join(f"[{tokens}] = tile_{bits}_{tokens}" for tokens in TILES[instructions])
        tiles += f"static const tile tiles_{bits}[] = {{{entries}}};\n"
    return HEAD + tiles + BODY + PREPARE
