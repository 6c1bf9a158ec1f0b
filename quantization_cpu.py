"""The CPU kernels: a C source compiled at first use for AVX512-VNNI, and torch's own int8 operators elsewhere.

Half-precision inputs are rounded to int8 in groups of 128 (or of the weights' group, if smaller) with a scale each, as
llama.cpp does, and multiplied by VNNI dot products of four; float32 inputs are multiplied in float32, and exactly.

The layout that the C code reads, in place of the released packing: int8 [out / 32, in / step, 128], padded to whole
blocks of 32 rows and 128 inputs. One step is 4 inputs (int8) or 8 (int4) of 32 rows: byte 4 * row + input holds
q + 128, or q + 8 with the next four inputs in the high nibble. Unsigned, since that is what the dot product takes; the
offset comes back as a start of -128 or -8 times the sum of the group's inputs.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, GROUP = 32, 128  # a block of the layout: output rows, inputs
TILES = (1, 2, 4, 8, 12)  # tokens multiplied together; 12 x 32 rows fill 24 of the 32 registers
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLAGS = ("-O3", "-fPIC", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mf16c", "-mfma")


# ---- the C source ---------------------------------------------------------------------------------------------------


def tile_source(bits: int, tokens: int) -> str:
    """A group of inputs times 32 rows for `tokens` tokens, registers placed by hand: GCC spills the intrinsics' form.

    zmm(2t), zmm(2t + 1): the sums of token t with rows 0-15 and 16-31. x: [input / 4][token][4] int8.
    """
    begin = [f"vpbroadcastd {4 * t}(%[start]), %%zmm{2 * t}; vmovdqa64 %%zmm{2 * t}, %%zmm{2 * t + 1}" for t in range(tokens)]
    step = [f"vmovdqu64 {64 * half}(%[w]), %%zmm{24 + half}" for half in (0, 1)]
    if tokens <= 4:  # few tokens read the weights faster than the hardware's prefetcher brings them
        step += [f"prefetcht{level} {ahead + line}(%[w])" for level, ahead in ((0, 2048), (1, 16384)) for line in (0, 64)]
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
            end.append(f"vmulps %%zmm{26 + half}, %%zmm30, %%zmm{28 + half}; vcvtdq2ps %%zmm{2 * t + half}, %%zmm{2 * t + half}")
            end.append(f"vfmadd213ps {128 * t + 64 * half}(%[sums]), %%zmm{28 + half}, %%zmm{2 * t + half}")
            end.append(f"vmovups %%zmm{2 * t + half}, {128 * t + 64 * half}(%[sums])")
    advance = [f"add $128, %[w]; add ${4 * quads * tokens}, %[x]; dec %[steps]; jnz 1b"]
    asm = "\n".join(f'    "{line}\\n"' for line in ["vpbroadcastd %[mask], %%zmm31", *begin, "1:", *step, *advance, *end])
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
    half = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
  }
  _mm256_mask_storeu_epi16((int16_t *)p + i, m, half);
}

/* One scale a row of the block: scale[row][g] of [out][groups], to s[32]. */
static inline void scales_of(const void *scale, int type, long block, long out, long groups, long g, float *s) {
  for (long r = 0; r < 32; r += 16) {
    long row = block * 32 + r;
    if (groups == 1) _mm512_storeu_ps(s + r, load(scale, type, row, first(out - row)));
    else for (long i = 0; i < 16; i++) s[r + i] = row + i < out ? _mm512_cvtss_f32(load(scale, type, (row + i) * groups + g, 1)) : 0;
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

/* y[n][out] = x[n][k] times the block layout. groups: weight scales a row; group: inputs that share an activation scale. */
void linear(const void *x, void *y, const uint8_t *w, const void *scale, const void *bias, char *scratch, long n, long k,
            long out, long groups, long group, int bits, int xtype, int stype, int btype, int threads) {
  long padded = (k + 127) / 128 * 128, ng = padded / group, blocks = (out + 31) / 32, tiles = (n + 11) / 12, room = n + 12;
  int8_t *q = (int8_t *)scratch;
  float *xs = (float *)(scratch + room * padded);
  int32_t *start = (int32_t *)(xs + room * ng);
  const int esize = xtype == FLOAT32 ? 4 : 2;
  #pragma omp parallel for num_threads(threads) schedule(static) if (n > 1)
  for (long token = 0; token < 12 * (tiles - 1) + width(n - 12 * (tiles - 1)); token++) {
    long from = token / 12 * 12, t = token - from, stride = width(n - from);
    quantize_token(token < n ? (const char *)x + token * k * esize : 0, xtype, k, padded, group, bits == 8 ? 128 : 8, stride,
                   q + from * padded + 4 * t, xs + from * ng + t, start + from * ng + t);
  }
  const long block_bytes = padded * 4 * bits, group_bytes = group * 4 * bits;
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (long block = 0; block < blocks; block++) {
    float ws[groups * 32], sums[12 * 32];
    for (long g = 0; g < groups; g++) scales_of(scale, stype, block, out, groups, g, ws + 32 * g);
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
          if (bias) v = _mm512_add_ps(v, load(bias, btype, row, m));
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

static inline __attribute__((always_inline)) void exact(const float *x, const uint8_t *w, const float *ws, long padded, long groups,
                                                        long per_group, int bits, int n, float *sums) {
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
          for (int t = 0; t < n; t++) sum[t][half] = _mm512_fmadd_ps(f, _mm512_set1_ps(x[t * padded + k + i]), sum[t][half]);
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
void linear_float32(const float *x, float *y, const uint8_t *w, const void *scale, const void *bias, long n, long k, long out,
                    long groups, int bits, int stype, int btype, int threads) {
  long padded = (k + 127) / 128 * 128, blocks = (out + 31) / 32, per_group = k / groups;
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (long block = 0; block < blocks; block++) {
    float ws[groups * 32], sums[4 * 32];
    const uint8_t *at = w + block * padded * 4 * bits;
    for (long g = 0; g < groups; g++) scales_of(scale, stype, block, out, groups, g, ws + 32 * g);
    #define CASE(N) case N: if (bits == 4) exact(x, at, ws, padded, groups, per_group, 4, N, sums); \
                            else exact(x, at, ws, padded, groups, per_group, 8, N, sums); break;
    switch (n) { CASE(1) CASE(2) CASE(3) CASE(4) }
    for (long t = 0; t < n; t++)
      for (long r = 0; r < 32; r += 16) {
        long row = block * 32 + r;
        __mmask16 m = first(out - row);
        __m512 v = _mm512_loadu_ps(sums + 32 * t + r);
        if (bias) v = _mm512_add_ps(v, load(bias, btype, row, m));
        store(y, FLOAT32, t * out + row, m, v);
      }
  }
}

/* The float weight of 32 * blocks rows, transposed: to[k][32 * blocks]. */
void transposed(const uint8_t *w, const void *scale, float *to, long begin, long blocks, long k, long out, long groups, int bits,
                int stype, int threads) {
  const long padded = (k + 127) / 128 * 128, inputs = bits == 4 ? 8 : 4, per_group = k / groups, width = 32 * blocks;
  #pragma omp parallel for num_threads(threads) schedule(static) if (groups > 1)
  for (long g = 0; g < groups; g++) {  // with one scale a row, the threads share the rows' only group below
    float ws[width];
    for (long b = 0; b < blocks; b++) scales_of(scale, stype, begin + b, out, groups, g, ws + 32 * b);
    #pragma omp parallel for num_threads(groups == 1 ? threads : 1) schedule(static)
    for (long from = g * per_group; from < (g + 1) * per_group; from += inputs)
      for (long b = 0; b < 2 * blocks; b++) {
        const __m512 table = TABLE, s = _mm512_loadu_ps(ws + 16 * b);
        __m512i v = _mm512_loadu_si512(w + (begin + b / 2) * padded * 4 * bits + from / inputs * 128 + 64 * (b & 1));
        for (long i = 0; i < min(inputs, k - from); i++)
          _mm512_storeu_ps(to + (from + i) * width + 16 * b, _mm512_mul_ps(weight(v, bits, i, table), s));
      }
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


# ---- compiling it ---------------------------------------------------------------------------------------------------


def cache_folder() -> str:
    """A folder that only this user can write: what is loaded from it runs."""
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "chatglm2")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.stat(folder)
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return tempfile.mkdtemp(prefix="chatglm2-")


def compiled() -> str:
    """The path of the compiled library. Two processes may compile at once: each renames a whole file into place."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler or not shutil.which(compiler):
        raise OSError("there is no C compiler: install gcc, or name one in the environment variable CC")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    text = source()
    key = hashlib.sha256("\n".join((text, compiler, version, *FLAGS)).encode()).hexdigest()[:16]
    path = os.path.join(cache_folder(), f"quantization_cpu-{key}.so")
    if not os.path.exists(path):
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            code, object_file, library = (os.path.join(folder, "kernel." + suffix) for suffix in ("c", "o", "so"))
            with open(code, "w") as file:
                file.write(text)
            # Linked without OpenMP's runtime: its symbols are those that torch has loaded, so that there is only one.
            for command in ([*FLAGS, "-c", code, "-o", object_file], ["-shared", object_file, "-o", library]):
                done = subprocess.run([compiler, *command], capture_output=True, text=True)
                if done.returncode:
                    raise OSError(f"{compiler} could not compile the kernel: {done.stderr.strip()[-300:]}")
            os.replace(library, path)
    return path


@functools.lru_cache(maxsize=None)
def load_library() -> tuple[Optional[ctypes.CDLL], str]:
    """(the compiled kernels, "") or (None, why there are none and what would help)."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return None, f"the kernel is written for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None, "this CPU has no AVX512-VNNI instructions"
    try:
        library = ctypes.CDLL(compiled())
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    if not library.supported():
        return None, "this CPU has no AVX512-VNNI instructions"
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    library.linear.argtypes = (p, p, p, p, p, p, n, n, n, n, n, i, i, i, i, i)
    library.linear_float32.argtypes = (p, p, p, p, p, n, n, n, n, i, i, i, i)
    library.transposed.argtypes = (p, p, p, n, n, n, n, n, i, i, i)
    for function in (library.linear, library.linear_float32, library.transposed):
        function.restype = None
    return library, ""


def unavailable(device: torch.device) -> Optional[str]:
    """None where the compiled kernels can run on `device`, else why not, and what would make them run."""
    if device.type != "cpu":
        return "it computes on the CPU; move the model there with .cpu()"
    return load_library()[1] or None


# ---- the layout and the kernels -------------------------------------------------------------------------------------


def _padded(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def _on_large_pages(size: int) -> Tensor:
    """`size` bytes as int8, on 2 MiB pages where the system has them: a fifth faster to read from end to end."""
    if size < 1 << 20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.int8)
    page = 1 << 21
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    whole = torch.frombuffer(memory, dtype=torch.int8)
    begin = -whole.data_ptr() % page
    return whole[begin : begin + size]


def readable(in_features: int, group_size: Optional[int]) -> bool:
    """Whether the C code takes these groups; others stay in the released packing and go to torch."""
    return in_features > 0 and (group_size in (None, 32, 64) or group_size % GROUP == 0)


def to_layout(weight: Tensor, bits: int) -> Tensor:
    """The released packing, int8 [out, in] or [out, in / 2] -> the layout, int8 [out / 32, in / step, 128]."""
    out, columns = weight.shape[0], weight.shape[1] * 8 // bits
    step, offset = (4, 128) if bits == 8 else (8, 8)
    blocks, steps = _padded(out, ROWS) // ROWS, _padded(columns, GROUP) // step
    layout = _on_large_pages(blocks * steps * 128).view(blocks, steps, 128)
    for block in range(0, blocks, 16):
        part = weight[block * ROWS : (block + 16) * ROWS]
        part = F.pad(part, (0, steps * step * bits // 8 - weight.shape[1], 0, -part.shape[0] % ROWS))
        part = part.view(-1, ROWS, steps, step * bits // 8)  # 4 bytes a row and step, either way
        if bits == 8:
            part = part ^ -128
        else:  # nibbles (0, 1) (2, 3) (4, 5) (6, 7) -> (4, 0) (5, 1) (6, 2) (7, 3), high first, each with q + 8
            even, odd = (part >> 4) & 15, part & 15
            inputs = torch.stack((even, odd), dim=-1).flatten(-2) ^ 8
            part = inputs[..., 4:] << 4 | inputs[..., :4]
        layout[block : block + 16] = part.transpose(1, 2).flatten(-2)
    return layout


def from_layout(layout: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """The reverse of `to_layout`, in plain torch, so that it runs anywhere."""
    packed = torch.empty(out_features, in_features * bits // 8, dtype=torch.int8, device=layout.device)
    for block in range(0, layout.shape[0], 16):
        part = layout[block : block + 16].unflatten(-1, (ROWS, 4)).transpose(1, 2)  # [block, row, step, byte]
        if bits == 8:
            part = part ^ -128
        else:
            inputs = torch.cat((part & 15, (part >> 4) & 15), dim=-1) ^ 8
            part = inputs[..., 0::2] << 4 | inputs[..., 1::2]
        rows = packed[block * ROWS : (block + 16) * ROWS]
        rows.copy_(part.flatten(2).flatten(0, 1)[: rows.shape[0], : rows.shape[1]])
    return packed


def _pointer(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] -> [N, out]. `weight` in the layout, or in the released packing, which is laid out for this call only."""
    n, k = x.shape
    out, groups = weight_scale.shape[0], weight_scale.shape[1] if weight_scale.dim() == 2 else 1
    group_size = k // groups if weight_scale.dim() == 2 else None
    if weight.dim() == 2:
        if n == 0 or not readable(k, group_size):
            return stock_linear(x, weight, weight_scale, bias, bits)
        weight = to_layout(weight, bits)
    library, threads = load_library()[0], torch.get_num_threads()
    weight_scale = weight_scale.contiguous()
    types = TYPES[weight_scale.dtype], TYPES[weight_scale.dtype if bias is None else bias.dtype]
    y = x.new_empty(n, out)
    if x.dtype == torch.float32 and n > 4:
        return _float32_by_blocks(x, weight, weight_scale, bias, bits, y)
    if x.dtype == torch.float32:
        padded = F.pad(x, (0, -k % GROUP)).contiguous()
        library.linear_float32(padded.data_ptr(), y.data_ptr(), weight.data_ptr(), weight_scale.data_ptr(), _pointer(bias),
                               n, k, out, groups, bits, *types, threads)  # fmt: skip
        return y
    group = min(group_size or GROUP, GROUP)
    width = _padded(k, GROUP)
    scratch = torch.empty((n + 12) * (width + 8 * (width // group)), dtype=torch.int8)
    library.linear(x.data_ptr(), y.data_ptr(), weight.data_ptr(), weight_scale.data_ptr(), _pointer(bias), scratch.data_ptr(),
                   n, k, out, groups, group, bits, TYPES[x.dtype], *types, threads)  # fmt: skip
    return y


def _float32_by_blocks(x, weight, weight_scale, bias, bits, y):
    """Many tokens in float32: the weight is restored 512 rows at a time and multiplied by torch."""
    k, out = x.shape[1], y.shape[1]
    groups = weight_scale.shape[1] if weight_scale.dim() == 2 else 1
    restored = torch.empty(k * 512)
    for begin in range(0, weight.shape[0], 16):
        blocks = min(16, weight.shape[0] - begin)
        load_library()[0].transposed(weight.data_ptr(), weight_scale.data_ptr(), restored.data_ptr(), begin, blocks, k, out, groups,
                                     bits, TYPES[weight_scale.dtype], torch.get_num_threads())  # fmt: skip
        rows = slice(begin * ROWS, min((begin + blocks) * ROWS, out))
        y[:, rows] = x @ restored[: k * blocks * ROWS].view(k, -1)[:, : rows.stop - rows.start]
    return y if bias is None else y.add_(bias)


# ---- without them: torch's operators --------------------------------------------------------------------------------


def stock_unavailable(device: torch.device) -> Optional[str]:
    """None on any CPU, else what would make torch's CPU operators run."""
    return None if device.type == "cpu" else "it computes on the CPU; move the model there with .cpu()"


def stock_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] -> [N, out] by torch's operators, `weight` in the released packing, a million weights at a time.

    Float32 inputs, and weights in groups, are multiplied in float32. Half precision is multiplied by int8 weights: up to
    4 tokens as they are, more of them rounded to int8 with a scale a token, but for channels that stand far out.
    """
    from .quantization import dequantize_weight, unpack

    out, k = weight_scale.shape[0], x.shape[1]
    integers = x.dtype != torch.float32 and weight_scale.dim() == 1 and min(x.shape) > 0 and torch.backends.mkldnn.is_available()
    few = x.shape[0] <= 4
    if not integers:
        x32 = x.float()
    elif few:
        x16 = x.to(torch.bfloat16)
    else:
        x8, x_scale, outliers = _round_tokens(x.float())
        x_outliers = x.float()[:, outliers]
    y = torch.empty(x.shape[0], out)
    rows = max((1 << (20 if bits == 4 or not integers else 30)) // max(k, 1), 1)
    for i in range(0, out, rows):
        part = slice(i, i + rows)
        if not integers:
            y[:, part] = x32 @ dequantize_weight(weight[part], weight_scale[part], bits, torch.float32).t()
            continue
        q = unpack(weight[part]) if bits == 4 else weight[part]
        scale = weight_scale[part].float()
        if few:
            y[:, part] = torch._weight_int8pack_mm(x16, q.contiguous(), torch.ones(len(q), dtype=x16.dtype)) * scale
        else:
            y[:, part] = (torch._int_mm(x8, q.t()) * x_scale + x_outliers @ q[:, outliers].float().t()) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _round_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, in] -> (int8 [N, in], scale [N, 1], the channels left out of them for standing 8 times above the middle)."""
    peaks = x.abs().amax(dim=0)
    outliers = (peaks > 8 * peaks.median()).nonzero().flatten()
    x = x.index_fill(1, outliers, 0)
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return (x / torch.where(scale == 0, 1, scale)).round_().to(torch.int8), scale, outliers
