"""The AVX2 part of the CPU kernels' C source: the tiles, and int8 prompts on CPUs without AVX-VNNI.

Those have no dot product of four bytes. `vpmaddubsw` adds two products, of an unsigned and a signed byte, in 16 bits.
In int4 sums of 16 bits hold eight of its results. In int8 two products fit if the weight's sign is moved to the input,
and must be widened at once: of four instructions per 32 products three need one of the two multipliers. So prompts take
Winograd's inner product (1968) in 16 bits, with one such instruction and three additions, and the same integers:

    w0 x0 + w1 x1 = (w0 + x1) (w1 + x0) - w0 w1 - x0 x1
"""

TOKENS = (1, 2, 4)  # per tile, as many as the registers hold
MOST = 128  # tokens of an int8 prompt that are multiplied at a time: what they need stays in the cache


def strip_source(tokens: int) -> str:
    """A group of int8 inputs in 16 bits times 16 rows for `tokens` tokens, in assembly: GCC spills registers.

    ymm(2t), ymm(2t + 1): the sums of token t with rows 0-7 and 8-15. w: [input / 4][2][even, odd][16] int16, x:
    [input / 4][token][even, odd][2] int16.
    """
    begin, end = [], []
    step = ["prefetcht0 (%[ahead])", *(f"vmovdqu {32 * i}(%[w]), %%ymm{8 + i}" for i in range(4))]
    for t in range(tokens):
        step += [f"vpbroadcastd {8 * t + 4 * odd}(%[x]), %%ymm{12 + odd}" for odd in (0, 1)]
        end.append(f"vbroadcastss {4 * t}(%[xs]), %%ymm12")
        for half in (0, 1):
            total, to = f"%%ymm{2 * t + half}", f"{128 * t + 32 * half}(%[sums])"
            begin.append(f"vpbroadcastd {4 * t}(%[start]), {total}; vpaddd {32 * half}(%[rows]), {total}, {total}")
            even, odd = (12, 13) if half else (14, 15)  # the second may overwrite the inputs
            step.append(f"vpaddw %%ymm{9 + 2 * half}, %%ymm12, %%ymm{even}")
            step.append(f"vpaddw %%ymm{8 + 2 * half}, %%ymm13, %%ymm{odd}")
            step.append(f"vpmaddwd %%ymm{even}, %%ymm{odd}, %%ymm{even}; vpaddd %%ymm{even}, {total}, {total}")
            end.append(f"vmulps {32 * half}(%[ws]), %%ymm12, %%ymm13; vcvtdq2ps {total}, {total}")
            end.append(f"vfmadd213ps {to}, %%ymm13, {total}; vmovups {total}, {to}")
    advance = f"add %[stride], %[ahead]; add $128, %[w]; add ${8 * tokens}, %[x]; dec %[quads]; jnz 1b"
    asm = "\n".join(f'    "{line}\\n"' for line in [*begin, "1:", *step, advance, *end])
    clobbers = ", ".join(f'"xmm{i}"' for i in range(16))
    return f"""
INLINE void strip_{tokens}(const __m256i *w, const int16_t *x, const int32_t *start, const __m256i *rows,
    const float *xs, const float *ws, float *sums, long quads, const uint8_t *ahead, long stride) {{
  asm volatile(
{asm}
    : [w] "+r"(w), [x] "+r"(x), [quads] "+r"(quads), [ahead] "+r"(ahead)
    : [start] "r"(start), [rows] "r"(rows), [xs] "r"(xs), [ws] "r"(ws), [sums] "r"(sums), [stride] "r"(stride)
    : "memory", "cc", {clobbers});
}}
"""


AVX2 = r"""
#ifdef __AVXVNNI__
enum { OFFSET_4 = 8, OFFSET_8 = 128 };
#else
enum { OFFSET_4 = 8, OFFSET_8 = 0 };
#define PROMPT 7  /* tokens from which on int8 takes `prompt` */
#endif

/* sum + products of unsigned and signed bytes, four per lane; any two products must fit in 16 bits */
static inline __m256i dot(__m256i sum, __m256i u, __m256i s) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(sum, u, s);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

/* The same for nibbles u: sums of 16 bits, which hold eight such dots, or of 32. The empty asm fixes the order of the
   additions: GCC's own order runs out of registers. */
static inline __m256i dot_nibbles(__m256i sum, __m256i u, __m256i s) {
#ifdef __AVXVNNI__
  return dot(sum, u, s);
#else
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s));
  asm("" : "+x"(sum));
  return sum;
#endif
}

/* The sums of dot_nibbles in 32 bits. */
static inline __m256i widened(__m256i sum) {
#ifdef __AVXVNNI__
  return sum;
#else
  return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
#endif
}

static inline __m256i quad(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

/* 8 * parts rows at a time. int8 moves the sign of w to x: two products are at most 2 * 128 * 127, which fits. */
INLINE void multiply(const uint8_t *w, const int8_t *x, const int32_t *start,
    const float *xs, const float *ws, float *sums, long steps, int bits, int tokens, int parts) {
  const __m256i nibble = _mm256_set1_epi8(15), highest = _mm256_set1_epi8(-128);
  const int together = bits == 8 ? 1 : 4, signs = bits == 8 && OFFSET_8 == 0;
  for (int from = 0; from < 4; from += parts) {
    __m256i sum[4][4];
    for (int t = 0; t < tokens; t++)
      for (int p = 0; p < parts; p++) sum[t][p] = _mm256_set1_epi32(start[t]);
    const int8_t *quads = x;
    const uint8_t *at = w + 32 * from;
    for (long step = 0; step < steps; step += together) {
      __m256i some[4][4] = {0};
      #pragma GCC unroll 4
      for (int i = 0; i < together; i++, at += 128, quads += 4 * tokens * (bits == 8 ? 1 : 2)) {
        __m256i v[4], low[4], high[4];
        for (int p = 0; p < parts; p++) {
          if (tokens > 1 && p % 2 == 0) _mm_prefetch((const char *)at + 32 * p + AHEAD, _MM_HINT_T0);
          v[p] = _mm256_loadu_si256((const __m256i *)(at + 32 * p));
          if (signs) {
            v[p] = _mm256_xor_si256(v[p], highest);
            low[p] = _mm256_abs_epi8(v[p]);
          } else if (bits == 8) low[p] = v[p];
          else {
            low[p] = _mm256_and_si256(v[p], nibble), high[p] = _mm256_and_si256(_mm256_srli_epi32(v[p], 4), nibble);
          }
        }
        for (int t = 0; t < tokens; t++) {
          const __m256i s = quad(quads + 4 * t);
          for (int p = 0; p < parts; p++)
            if (bits == 8) sum[t][p] = dot(sum[t][p], low[p], signs ? _mm256_sign_epi8(s, v[p]) : s);
            else some[t][p] = dot_nibbles(some[t][p], low[p], s);
        }
        for (int t = 0; t < tokens && bits == 4; t++) {
          const __m256i s = quad(quads + 4 * (tokens + t));
          for (int p = 0; p < parts; p++) some[t][p] = dot_nibbles(some[t][p], high[p], s);
        }
      }
      for (int t = 0; t < tokens && bits == 4; t++)
        for (int p = 0; p < parts; p++) sum[t][p] = _mm256_add_epi32(sum[t][p], widened(some[t][p]));
    }
    for (int t = 0; t < tokens; t++)
      for (int p = 0; p < parts; p++) {
        float *to = sums + 32 * t + 8 * (from + p);
        __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(ws + 8 * (from + p)), _mm256_set1_ps(xs[t]));
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][p]), scale, _mm256_loadu_ps(to)));
      }
  }
}

#define TILE(BITS, TOKENS, PARTS) static void tile_##BITS##_##TOKENS(const uint8_t *w, const int8_t *x, \
    const int32_t *start, const float *xs, const float *ws, float *sums, long steps) { \
  multiply(w, x, start, xs, ws, sums, steps, BITS, TOKENS, PARTS); \
}
TILE(4, 1, 4) TILE(4, 2, 2) TILE(4, 4, 2) TILE(8, 1, 4) TILE(8, 2, 4) TILE(8, 4, 2)
"""

PROMPT = r"""
/* A group of 32 rows for two strips, and -(w0 w1 + w2 w3 + ...) of each row. */
static void unpack(const uint8_t *w, long quads, __m256i *strip, __m256i *rows) {
  for (int part = 0; part < 4; part++) {
    __m256i products = _mm256_setzero_si256(), *to = strip + part / 2 * quads * 4 + part % 2 * 2;
    for (long i = 0; i < quads; i++) {
      __m256i v = _mm256_loadu_si256((const __m256i *)(w + 128 * i + 32 * part));
      v = _mm256_xor_si256(v, _mm256_set1_epi8(-128));
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), odd = _mm256_srai_epi16(v, 8);
      _mm256_storeu_si256(to + 4 * i, even);
      _mm256_storeu_si256(to + 4 * i + 1, odd);
      products = _mm256_sub_epi32(products, _mm256_madd_epi16(even, odd));
    }
    _mm256_storeu_si256(rows + part, products);
  }
}

/* A token's group for the strips, and -(x0 x1 + x2 x3 + ...). */
static int32_t widen(const int8_t *q, long quads, long tokens, int16_t *x) {
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0);
  __m128i twice = _mm_setzero_si128();
  for (long i = 0; i < quads; i += 2, q += 8, x += 8 * tokens) {
    const __m128i v = _mm_cvtepi8_epi16(_mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)q), order));
    _mm_storel_epi64((__m128i *)x, v);
    _mm_storel_epi64((__m128i *)(x + 4 * tokens), _mm_unpackhi_epi64(v, v));
    twice = _mm_add_epi32(twice, _mm_madd_epi16(v, _mm_shuffle_epi32(v, 0xb1)));
  }
  twice = _mm_add_epi32(twice, _mm_unpackhi_epi64(twice, twice));
  return -(_mm_cvtsi128_si32(twice) + _mm_extract_epi32(twice, 1)) / 2;
}

/* `linear` for int8 and many tokens. scratch goes on with the inputs, and a strip and sums for each thread. */
static void prompt(const void *x, void *y, const uint8_t *w, const void *scale, const void *bias, char *scratch, long n,
                   long k, long out, long groups, long group, int xtype, int stype, int threads) {
  const long padded = (k + 127) / 128 * 128, ng = padded / group, blocks = (out + 31) / 32, quads = group / 4;
  const long room = min((n + 3) / 4 * 4, MOST), own = 64 * group + 128 + 128 * room;
  int16_t *wide = (int16_t *)(scratch + threads * groups * 128);  /* [group][token / 4][input / 4][token][2][2] */
  float *xs = (float *)(wide + room * padded);  /* [group][token] */
  int32_t *start = (int32_t *)(xs + room * ng);
  char *parts = (char *)(start + room * ng);
  for (long first = 0; first < n; first += MOST) {
    const long tokens = min(n - first, MOST), spread = min((tokens + 3) / 4, 4);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long token = 0; token < (tokens + 3) / 4 * 4; token++) {
      const long from = token / 4 * 4, together = width(tokens - from);
      for (long g = 0; g < ng && token - from < together; g++) {
        const char *at = (const char *)x + ((first + token) * k + g * group) * size_of(xtype);
        const long i = g * room + token;
        int8_t q[128];
        quantize_token(token < tokens ? at : 0, xtype, k - g * group, group, group, 0, 1, q, xs + i, start + i);
        start[i] = widen(q, quads, together, wide + (g * room + from) * group + 4 * (token - from));
      }
    }
    #pragma omp parallel for num_threads(threads) schedule(guided)
    for (long block = 0; block < blocks; block++) {
      float *ws = (float *)scratch + omp_get_thread_num() * groups * 32;
      __m256i *strip = (__m256i *)(parts + omp_get_thread_num() * own), *rows = strip + 2 * group;
      float *sums = (float *)(rows + 4);  /* [token][32] */
      scales_of(scale, stype, block, out, groups, ws);
      memset(sums, 0, 128 * room);
      for (long g = 0; g < ng; g++) {
        const float *s = ws + (groups == 1 ? 0 : min(g * group * groups / k, groups - 1) * 32);
        const uint8_t *at = w + (block * padded + g * group) * 32, *ahead = at + AHEAD;
        unpack(at, quads, strip, rows);
        for (long from = 0; from < tokens; from += 4) {
          const long i = g * room + from, together = width(tokens - from);
          const long stride = from < 4 * spread ? 64 / spread : 0;  /* the first tiles prefetch as much as a group */
          for (int half = 0; half < 2; half++, ahead += stride * quads) {
            #define STRIP(TOKENS) strip_##TOKENS(strip + half * group, wide + i * group, start + i, rows + 2 * half, \
                xs + i, s + 16 * half, sums + 32 * from + 16 * half, quads, ahead, stride)
            if (together == 4) STRIP(4); else if (together == 2) STRIP(2); else STRIP(1);
          }
        }
      }
      write_block(sums, bias, stype, y, xtype, first, tokens, out, block);
    }
  }
}
"""


def source() -> str:
    """The tiles as `tile_{bits}_{tokens}`, and for CPUs without AVX-VNNI `prompt`."""
    strips = "".join(map(strip_source, TOKENS))
    return f"enum {{ MOST = {MOST} }};\n{AVX2}#ifndef __AVXVNNI__\n{strips}{PROMPT}#endif\n"
