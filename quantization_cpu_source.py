"""The C source of the CPU kernels, for AVX512-VNNI: `source()` is the whole file.

The layout it reads: int8 [out / 32, in / step, 128], padded to whole blocks of 32 rows and 128 inputs. A step is 4
inputs (int8) or 8 (int4) of 32 rows: byte 4 * row + input holds q + 128, or q + 8 with the next four inputs in the high
nibble. Unsigned, since the dot product takes them so; the offset is taken back by sums that start at -128 or -8 times
the sum of the group's inputs. The same layout serves one token and many.
"""

TILES = (1, 2, 4, 8, 12)  # tokens multiplied together; 12 x 32 rows fill 24 of the 32 registers


def tile_source(bits: int, tokens: int) -> str:
    """A group of inputs times 32 rows for `tokens` tokens, registers placed by hand: GCC spills the intrinsics' form.

    zmm(2t), zmm(2t + 1): the sums of token t with rows 0-15 and 16-31. x: [input / 4][token][4] int8.
    """
    begin = [
        f"vpbroadcastd {4 * t}(%[start]), %%zmm{2 * t}; vmovdqa64 %%zmm{2 * t}, %%zmm{2 * t + 1}" for t in range(tokens)
    ]
    step = [f"vmovdqu64 {64 * half}(%[w]), %%zmm{24 + half}" for half in (0, 1)]
    if (bits, tokens) == (4, 4):  # the one tile that gains by it: with less work a byte the hardware runs ahead itself
        step += [
            f"prefetch{level} {ahead + line}(%[w])"
            for level, ahead in (("t0", 2048), ("t1", 16384))
            for line in (0, 64)
        ]
    quads = 1 if bits == 8 else 2
    for quad in range(quads):
        weights = 24
        if bits == 4:
            weights = 26
            if quad:
                step += [f"vpsrld $4, %%zmm{24 + half}, %%zmm{24 + half}" for half in (0, 1)]
            step += [f"vpandd %%zmm31, %%zmm{24 + half}, %%zmm{26 + half}" for half in (0, 1)]
        for t in range(tokens):
            step.append(f"vpbroadcastd {4 * (quad * tokens + t)}(%[x]), %%zmm{28 + t % 2}")
            step += [f"vpdpbusd %%zmm{28 + t % 2}, %%zmm{weights + half}, %%zmm{2 * t + half}" for half in (0, 1)]
    end = ["vmovups (%[ws]), %%zmm26", "vmovups 64(%[ws]), %%zmm27"]
    for t in range(tokens):  # sums += dot * x_scale * weight_scale
        end.append(f"vbroadcastss {4 * t}(%[xs]), %%zmm30")
        for half in (0, 1):
            end.append(f"vmulps %%zmm{26 + half}, %%zmm30, %%zmm{28 + half}")
            end.append(f"vcvtdq2ps %%zmm{2 * t + half}, %%zmm{2 * t + half}")
            end.append(f"vfmadd213ps {128 * t + 64 * half}(%[sums]), %%zmm{28 + half}, %%zmm{2 * t + half}")
            end.append(f"vmovups %%zmm{2 * t + half}, {128 * t + 64 * half}(%[sums])")
    advance = [f"add $128, %[w]; add ${4 * quads * tokens}, %[x]; dec %[steps]; jnz 1b"]
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


HEAD = r"""
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

int supported(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
      && __builtin_cpu_supports("avx512vnni");
}

enum { FLOAT32, FLOAT16, BFLOAT16 };
typedef void (*tile)(const uint8_t *, const int8_t *, const int32_t *, const float *, const float *, float *, long);

static inline long min(long a, long b) { return a < b ? a : b; }
static inline __mmask16 first(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1; }

static inline __m512 load(const void *p, int type, long i, __mmask16 m) {
  if (type == FLOAT32) return _mm512_maskz_loadu_ps(m, (const float *)p + i);
  __m256i half = _mm256_maskz_loadu_epi16(m, (const int16_t *)p + i);
  if (type == FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void store(void *p, int type, long i, __mmask16 m, __m512 v) {
  if (type == FLOAT32) { _mm512_mask_storeu_ps((float *)p + i, m, v); return; }
  __m256i half;
  if (type == FLOAT16) half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  else {  // round to nearest even; a nan stays one
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    half = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc0)));
  }
  _mm256_mask_storeu_epi16((int16_t *)p + i, m, half);
}

/* The block's scales, transposed: [out][groups] -> s[groups][32]. */
static inline void scales_of(const void *scale, int type, long block, long out, long groups, float *s) {
  for (long r = 0; r < 32; r++)
    for (long g = 0; g < groups; g += 16) {
      float part[16];
      long row = block * 32 + r, count = min(16, groups - g);
      _mm512_storeu_ps(part, row < out ? load(scale, type, row * groups + g, first(count)) : _mm512_setzero_ps());
      for (long i = 0; i < count; i++) s[(g + i) * 32 + r] = part[i];
    }
}

/* One token to int8 a group at a time: q = round(x / scale), scale = max|x| / 127, start = -offset * sum(q). */
static void quantize_token(const void *x, int type, long k, long padded, long group, int offset, long stride, int8_t *q,
                           float *scale, int32_t *start) {
  for (long g = 0; g * group < padded; g++) {
    __m512 v[8], largest = _mm512_setzero_ps();
    __mmask16 nan = 0;
    long parts = group / 16;
    for (long i = 0; i < parts; i++) {
      long at = g * group + 16 * i;
      v[i] = x ? load(x, type, at, first(k - at)) : _mm512_setzero_ps();
      largest = _mm512_max_ps(largest, _mm512_abs_ps(v[i]));
      nan |= _mm512_cmp_ps_mask(v[i], v[i], _CMP_UNORD_Q);
    }
    float s = _mm512_reduce_max_ps(largest) / 127;
    if (nan) s = __builtin_nanf("");
    int32_t total = 0;
    for (long i = 0; i < parts; i++) {
      __m512i rounded = _mm512_cvtps_epi32(_mm512_div_ps(v[i], _mm512_set1_ps(s)));
      if (!(s > 1e-37f && s < __builtin_inff())) rounded = _mm512_setzero_si512();  /* nan and inf give nan below */
      total += _mm512_reduce_add_epi32(rounded);
      int32_t quads[4];
      _mm_storeu_si128((__m128i *)quads, _mm512_cvtsepi32_epi8(rounded));
      for (int j = 0; j < 4; j++) memcpy(q + (g * group / 4 + 4 * i + j) * 4 * stride, quads + j, 4);
    }
    scale[g * stride] = s - s == 0 ? s : __builtin_nanf("");
    start[g * stride] = -offset * total;
  }
}
"""

BODY = r"""
static int width(long tokens) { return tokens > 8 ? 12 : tokens > 4 ? 8 : tokens > 2 ? 4 : tokens; }

/* y[n][out] = x[n][k] times the weight, plus bias, which has scale's type. groups: weight scales a row; group: inputs
   that share an activation scale. */
void linear(const void *x, void *y, const uint8_t *w, const void *scale, const void *bias, char *scratch, long n,
            long k, long out, long groups, long group, int bits, int xtype, int stype, int threads) {
  long padded = (k + 127) / 128 * 128, ng = padded / group, blocks = (out + 31) / 32;
  long tiles = (n + 11) / 12, room = n + 12;
  int8_t *q = (int8_t *)scratch;
  float *xs = (float *)(scratch + room * padded);
  int32_t *start = (int32_t *)(xs + room * ng);
  const int esize = xtype == FLOAT32 ? 4 : 2;
  #pragma omp parallel for num_threads(threads) schedule(static) if (n > 1)
  for (long token = 0; token < 12 * (tiles - 1) + width(n - 12 * (tiles - 1)); token++) {
    long from = token / 12 * 12, t = token - from, stride = width(n - from);
    quantize_token(token < n ? (const char *)x + token * k * esize : 0, xtype, k, padded, group, bits == 8 ? 128 : 8,
                   stride, q + from * padded + 4 * t, xs + from * ng + t, start + from * ng + t);
  }
  const long block_bytes = padded * 4 * bits, group_bytes = group * 4 * bits;
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (long block = 0; block < blocks; block++) {
    float ws[groups * 32], sums[12 * 32];
    scales_of(scale, stype, block, out, groups, ws);
    for (long from = 0; from < n; from += 12) {
      int tokens = width(n - from);
      tile multiply = bits == 8 ? tiles_8[tokens] : tiles_4[tokens];
      memset(sums, 0, sizeof sums);
      for (long g = 0; g < ng; g++)
        multiply(w + block * block_bytes + g * group_bytes, q + from * padded + g * group * tokens,
                 start + (from * ng + g * tokens), xs + (from * ng + g * tokens),
                 ws + (groups == 1 ? 0 : min(g * group * groups / k, groups - 1) * 32), sums, group_bytes / 128);
      for (long t = 0; t < min(tokens, n - from); t++)
        for (long r = 0; r < 32; r += 16) {
          long row = block * 32 + r;
          __mmask16 m = first(out - row);
          __m512 v = _mm512_loadu_ps(sums + 32 * t + r);
          if (bias) v = _mm512_add_ps(v, load(bias, stype, row, m));
          store(y, xtype, (from + t) * out + row, m, v);
        }
    }
  }
}

/* 16 weights of one input, as floats: the byte's `input` of each of 16 rows. */
static inline __m512 weight(__m512i v, int bits, int input, __m512 table) {
  if (bits == 4) return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 8 * (input & 3) + 4 * (input >> 2)), table);
  v = _mm512_and_si512(_mm512_srli_epi32(v, 8 * input), _mm512_set1_epi32(255));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(v, _mm512_set1_epi32(128)));
}

#define TABLE _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)

static inline __attribute__((always_inline)) void exact(const float *x, const uint8_t *w, const float *ws, long padded,
                                                        long groups, long per_group, int bits, int n, float *sums) {
  const __m512 table = TABLE;
  const long inputs = bits == 4 ? 8 : 4;
  __m512 total[4][2];
  for (int t = 0; t < n; t++) total[t][0] = total[t][1] = _mm512_setzero_ps();
  for (long g = 0; g < groups; g++) {
    __m512 sum[4][2];
    for (int t = 0; t < n; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    long to = groups == 1 ? padded : (g + 1) * per_group;
    for (long k = g * per_group; k < to; k += inputs, w += 128) {
      _mm_prefetch((const char *)w + 2048, _MM_HINT_T0); _mm_prefetch((const char *)w + 2112, _MM_HINT_T0);
      _mm_prefetch((const char *)w + 16384, _MM_HINT_T1); _mm_prefetch((const char *)w + 16448, _MM_HINT_T1);
      for (int half = 0; half < 2; half++) {
        __m512i v = _mm512_loadu_si512(w + 64 * half);
        for (int i = 0; i < inputs; i++) {
          __m512 f = weight(v, bits, i, table);
          for (int t = 0; t < n; t++)
            sum[t][half] = _mm512_fmadd_ps(f, _mm512_set1_ps(x[t * padded + k + i]), sum[t][half]);
        }
      }
    }
    for (int t = 0; t < n; t++)
      for (int half = 0; half < 2; half++)
        total[t][half] = _mm512_fmadd_ps(sum[t][half], _mm512_loadu_ps(ws + 32 * g + 16 * half), total[t][half]);
  }
  for (int t = 0; t < n; t++)
    for (int half = 0; half < 2; half++) _mm512_storeu_ps(sums + 32 * t + 16 * half, total[t][half]);
}

/* The float32 form, for up to 4 tokens; x is padded to whole groups of 128. */
void linear_float32(const float *x, float *y, const uint8_t *w, const void *scale, const void *bias, long n, long k,
                    long out, long groups, int bits, int stype, int threads) {
  long padded = (k + 127) / 128 * 128, blocks = (out + 31) / 32, per_group = k / groups;
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (long block = 0; block < blocks; block++) {
    float ws[groups * 32], sums[4 * 32];
    const uint8_t *at = w + block * padded * 4 * bits;
    scales_of(scale, stype, block, out, groups, ws);
    #define CASE(N) case N: if (bits == 4) exact(x, at, ws, padded, groups, per_group, 4, N, sums); \
                            else exact(x, at, ws, padded, groups, per_group, 8, N, sums); break;
    switch (n) { CASE(1) CASE(2) CASE(3) CASE(4) }
    for (long t = 0; t < n; t++)
      for (long r = 0; r < 32; r += 16) {
        long row = block * 32 + r;
        __mmask16 m = first(out - row);
        __m512 v = _mm512_loadu_ps(sums + 32 * t + r);
        if (bias) v = _mm512_add_ps(v, load(bias, stype, row, m));
        store(y, FLOAT32, t * out + row, m, v);
      }
  }
}

/* The float weight of 32 * blocks rows, transposed: to[k][32 * blocks]; so are their scales: [groups][32 * blocks]. */
void transposed(const uint8_t *w, const float *scale, float *to, long begin, long blocks, long k, long groups, int bits,
                int threads) {
  const long padded = (k + 127) / 128 * 128, inputs = bits == 4 ? 8 : 4, width = 32 * blocks;
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (long from = 0; from < k; from += inputs)
    for (long b = 0; b < 2 * blocks; b++) {
      const __m512 table = TABLE, s = _mm512_loadu_ps(scale + from * groups / k * width + 16 * b);
      __m512i v = _mm512_loadu_si512(w + (begin + b / 2) * padded * 4 * bits + from / inputs * 128 + 64 * (b & 1));
      for (long i = 0; i < min(inputs, k - from); i++)
        _mm512_storeu_ps(to + (from + i) * width + 16 * b, _mm512_mul_ps(weight(v, bits, i, table), s));
    }
}
"""


def source() -> str:
    """The whole C file: the tiles by their number of tokens between the parts that do not depend on it."""
    tables = ""
    for bits in (4, 8):
        entries = ", ".join(f"[{tokens}] = tile_{bits}_{tokens}" for tokens in TILES)
        tables += f"static const tile tiles_{bits}[] = {{{entries}}};\n"
    return HEAD + "".join(tile_source(bits, tokens) for bits in (4, 8) for tokens in TILES) + tables + BODY
