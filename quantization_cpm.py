"""Weight-only INT8 and INT4 linear layers in CUDA C, compiled and launched by cpm_kernels 1.0.11.

cpm_kernels ships GPU code only for cards up to 2021, but its NVRTC binding and its launcher work wherever CUDA does.
The source below is compiled at first use for the card it runs on, and launched on torch's current stream. It includes
no header, so NVRTC does not need the CUDA toolkit's include directory.

- `matvec`, up to 16 rows: reads the weight once for up to 8 rows of x, and dequantizes it in registers.
- `dequantize`, for more rows: dequantizes a piece of the weight at a time to x's dtype; torch multiplies. A piece has
  at most `PIECE` bytes, whatever the layer's size: 4,096 rows of 4,096 inputs in half precision.

In bytes moved per int4 weight, a pass of `matvec` over 8 rows costs 0.5, and dequantizing costs 4.5 (read the weight,
write and read half precision), so the limit is above 8 rows. Neither the best limit nor any speed has been measured.
"""

import ctypes
import functools
from typing import Optional

import torch
from torch import Tensor

from .quantization_format import Family

THREADS, OUTS = 128, 4  # threads of a matvec block, and outputs it computes
MAX_ROWS, FUSED_ROWS = 8, 16  # rows of x per block of matvec, and most rows for matvec
COMMON_ARCH = 75  # supported by every NVRTC from 11 to 13
PIECE = 32 << 20  # most bytes of dequantized weight at a time
TYPES = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}

# half: no bit trick is as short as the conversion instruction; bfloat16 is the upper half of a float
HALF = r"""
struct half { unsigned short bits; };
__device__ float to_float(half v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits)); return f; }
__device__ void store(half* p, float f) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(f)); }
"""

# The compiler's command line defines BITS (4, 8), X and SCALE (half, bfloat16, float: the types of x, y and bias, and
# of the scales), GROUPED (1: several scales a row), ROWS (of x, in a block of matvec), OUTS and THREADS.
SOURCE = r"""
struct bfloat16 { unsigned short bits; };
__device__ float to_float(bfloat16 v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ void store(bfloat16* p, float f) {  // to nearest, ties to even; nan stays nan
    unsigned u = __float_as_uint(f);
    p->bits = f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
__device__ float to_float(float v) { return v; }
__device__ void store(float* p, float f) { *p = f; }

// Byte i of `bytes`, a value with its sign bit flipped, as a float. It becomes the low mantissa bits of 2^23: a byte
// permutation and a subtraction. Integer-to-float instructions have a fraction of their rate.
__device__ float value(unsigned bytes, int i) {
    return __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 + i)) - (8388608.f + (1 << (BITS - 1)));
}

#define COLUMNS (32 / BITS)  // in a 4-byte word of the weight
constexpr int UNROLL = ROWS == 1 ? 4 : 1;  // words a thread loads at once; more rows need the registers for their sums
struct alignas(sizeof(X) * COLUMNS < 16 ? sizeof(X) * COLUMNS : 16) Columns { X value[COLUMNS]; };

// The columns of a word, in order, times s. In a byte of int4 the even column is in the high nibble.
__device__ void dequantize_word(unsigned word, float s, float* q) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if BITS == 4
        q[2 * i] = value((word >> 4 & 0x0f0f0f0fu) ^ 0x08080808u, i) * s;
        q[2 * i + 1] = value((word & 0x0f0f0f0fu) ^ 0x08080808u, i) * s;
#else
        q[i] = value(word ^ 0x80808080u, i) * s;
#endif
    }
}

// y [rows, out] = x [rows, in] * (q * scale)^T + bias. Block (i, j) computes OUTS outputs from i * OUTS on for ROWS
// rows from j * ROWS on; each of its threads sums every THREADS-th word of those OUTS weight rows. Rows and outputs
// beyond the end repeat the last one and are not stored. A word must not cross a group.
extern "C" __global__ void __launch_bounds__(THREADS)
matvec(const X* __restrict__ x, const unsigned* __restrict__ weight, const SCALE* __restrict__ scale,
       const X* __restrict__ bias, X* __restrict__ y, int rows, int in, int out, int groups) {
    const int out0 = blockIdx.x * OUTS, row0 = blockIdx.y * ROWS;
    const int words = in / COLUMNS, words_per_group = words / groups;
    float sum[ROWS][OUTS] = {};
#pragma unroll UNROLL
    for (int word = threadIdx.x; word < words; word += THREADS) {
        float q[OUTS][COLUMNS];
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            const size_t at = min(out0 + o, out - 1);
            const float s = GROUPED ? to_float(scale[at * groups + word / words_per_group]) : 1.f;
            dequantize_word(weight[at * words + word], s, q[o]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const Columns columns = ((const Columns*)x)[(size_t)min(row0 + r, rows - 1) * words + word];
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const float v = to_float(columns.value[c]);
#pragma unroll
                for (int o = 0; o < OUTS; o++) sum[r][o] += v * q[o][c];
            }
        }
    }
    __shared__ float total[THREADS / 32][ROWS * OUTS];  // added in a fixed order, so that results are deterministic
#pragma unroll
    for (int i = 0; i < ROWS * OUTS; i++) {
        float v = sum[i / OUTS][i % OUTS];
#pragma unroll
        for (int lane = 16; lane; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
        if (threadIdx.x % 32 == 0) total[threadIdx.x / 32][i] = v;
    }
    __syncthreads();
    const int row = row0 + threadIdx.x / OUTS, at = out0 + threadIdx.x % OUTS;
    if (threadIdx.x < ROWS * OUTS && row < rows && at < out) {
        float v = 0.f;
        for (int warp = 0; warp < THREADS / 32; warp++) v += total[warp][threadIdx.x];
        if (!GROUPED) v *= to_float(scale[at]);
        if (bias) v += to_float(bias[at]);
        store(&y[(size_t)row * out + at], v);
    }
}

// y [out, in] = q * scale. Block (i, j): one byte per thread, from i * THREADS on, of rows j, j + gridDim.y, ...
extern "C" __global__ void dequantize(const unsigned char* __restrict__ weight, const SCALE* __restrict__ scale,
                                      X* __restrict__ y, int in, int out, int groups) {
    const int width = in * BITS / 8, i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= width) return;
    const int group = i / (width / groups);
    for (size_t row = blockIdx.y; row < out; row += gridDim.y) {
        float q[COLUMNS];  // the first 8 / BITS belong to the byte
        dequantize_word(weight[row * width + i], to_float(scale[row * groups + group]), q);
#pragma unroll
        for (int c = 0; c < 8 / BITS; c++) store(&y[row * in + i * (8 / BITS) + c], q[c]);
    }
}
"""


def unavailable(device: torch.device) -> Optional[str]:
    """None if the kernels run on `device`, else one sentence with the reason and the remedy."""
    if device.type != "cuda":
        return f"cpm_kernels needs an NVIDIA GPU, not {device.type}: move the model with .to('cuda')"
    if torch.version.cuda is None:
        return "cpm_kernels needs a CUDA build of torch: install one from pytorch.org"
    try:
        from cpm_kernels.kernels import base
        from cpm_kernels.library import cublaslt, cuda, cudart, nvrtc  # noqa: F401  base's launcher needs all of them
    except ImportError as error:
        if error.name == "pkg_resources":
            return "cpm_kernels imports pkg_resources, which setuptools 82 dropped: pip install 'setuptools<82'"
        return f"cpm_kernels cannot be imported ({error}): pip install cpm_kernels==1.0.11"
    except (OSError, RuntimeError, AttributeError) as error:  # no driver, no DLL, a Mac, a CUDA that lacks a symbol
        reason = " ".join(str(error).split())
        return f"cpm_kernels cannot start ({reason}): it needs Linux or Windows, an NVIDIA driver and the CUDA toolkit"
    if nvrtc.version[0] < 11 or not cudart.version or not cuda.version:
        return (
            f"cpm_kernels found NVRTC {nvrtc.version}, CUDA runtime {cudart.version}, driver {cuda.version}, but needs "
            "NVRTC 11 or later and both others: install the CUDA toolkit, and set CUDA_PATH to its folder (on Windows, "
            "put its bin folder on PATH)"
        )
    if not all(hasattr(base, name) for name in ("LazyKernelCModule", "KernelFunction")):
        return "this version of cpm_kernels has no launcher for other kernels: pip install cpm_kernels==1.0.11"
    return None


@torch.no_grad()
def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] times the dequantized weight, transposed, plus bias -> [N, out], in x's dtype.

    x: float16, bfloat16 or float32, contiguous, N >= 0. weight: int8 [out, in], or [out, in / 2] packed (bits 4).
    weight_scale: [out] or [out, in / group_size], of any of those dtypes. bias: [out] or None. TypeError for others.
    """
    for name, tensor in (("x", x), ("weight_scale", weight_scale)):
        if tensor.dtype not in TYPES:
            raise TypeError(f"{name} is {tensor.dtype}: the CUDA kernels support {', '.join(map(str, TYPES))}")
    (rows, columns), (out, width) = x.shape, weight.shape  # width: bytes per row
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    if 0 in (rows, columns, out):
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    bias = None if bias is None else bias.to(x.dtype)
    groups = weight_scale.shape[1] if weight_scale.dim() == 2 else 1
    # matvec reads 4 bytes of the weight, with one scale, and up to 16 bytes of x at a time
    aligned = width % (4 * groups) == 0 and weight.data_ptr() % 4 == 0 and x.data_ptr() % 16 == 0
    if rows > FUSED_ROWS or not aligned:
        return dequantized_linear(x, weight, weight_scale, bias, bits, groups, y)
    block_rows = next(n for n in (1, 2, 4, MAX_ROWS) if n >= min(rows, MAX_ROWS))
    kernel = function("matvec", capability(x.device), bits, x.dtype, weight_scale.dtype, groups > 1, block_rows)
    grid = (-(-out // OUTS), -(-rows // block_rows), 1)
    launch(kernel, grid, x, weight, weight_scale, bias, y, rows, columns, out, groups)
    return y


def dequantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int, groups: int, y: Tensor
) -> Tensor:
    """Compute y [N, out] a few columns at a time, from as many dequantized rows of the weight."""
    (out, width), columns = weight.shape, x.shape[1]
    kernel = function("dequantize", capability(x.device), bits, x.dtype, weight_scale.dtype, groups > 1, 1)
    step = max(1, min(out, PIECE // (columns * x.element_size())))
    piece = torch.empty(step, columns, dtype=x.dtype, device=x.device)
    for i in range(0, out, step):
        end = min(i + step, out)
        grid = (-(-width // THREADS), min(end - i, 65535), 1)
        launch(kernel, grid, weight[i:end], weight_scale[i:end], piece, columns, end - i, groups)
        if bias is None:
            torch.mm(x, piece[: end - i].t(), out=y[:, i:end])
        else:
            torch.addmm(bias[i:end], x, piece[: end - i].t(), out=y[:, i:end])
    return y


@functools.lru_cache(None)
def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel, grid: tuple, *arguments) -> None:
    """Launch the KernelFunction on the device of its tensors, on torch's current stream. None is a null pointer."""
    from cpm_kernels.library import cudart

    device = arguments[0].device
    with torch.cuda.device(device):
        cudart.cudaSetDevice(torch.cuda.current_device())  # cpm_kernels uses its own copy of the CUDA runtime
        params = [
            ctypes.c_int32(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in arguments
        ]
        kernel(grid, (THREADS, 1, 1), 0, torch.cuda.current_stream().cuda_stream, params)


@functools.lru_cache(None)
def function(name: str, arch: int, bits: int, x: torch.dtype, scale: torch.dtype, grouped: bool, rows: int):
    """The kernel `name` for one compute capability and these types, a KernelFunction that loads itself on each card."""
    from cpm_kernels.kernels.base import KernelFunction, LazyKernelCModule

    macros = {"BITS": bits, "X": TYPES[x], "SCALE": TYPES[scale], "GROUPED": int(grouped), "ROWS": rows}
    macros = [f"-D{k}={v}" for k, v in {**macros, "OUTS": OUTS, "THREADS": THREADS}.items()]
    return KernelFunction(LazyKernelCModule(build(arch, macros)), name)


def build(arch: int, macros: list) -> bytes:
    """Compile for compute capability `arch`, or to PTX, which the driver compiles, if NVRTC is older than the card."""
    from cpm_kernels.library import nvrtc

    program = nvrtc.nvrtcProgram()
    nvrtc.nvrtcCreateProgram(program, HALF + SOURCE, "quantization_cpm.cu", 0, [], [])
    try:
        options = ["--std=c++14", *macros, f"--gpu-architecture=sm_{arch}"]
        nvrtc.nvrtcCompileProgram(program, len(options), options)
        code = ctypes.create_string_buffer(nvrtc.nvrtcGetCUBINSize(program))
        nvrtc.nvrtcGetCUBIN(program, code)
    except RuntimeError as error:
        if "INVALID_OPTION" not in str(error) or arch < COMMON_ARCH:
            raise RuntimeError(f"NVRTC {nvrtc.version} cannot compile for capability {arch / 10}: {error}") from error
        options[-1] = f"--gpu-architecture=compute_{COMMON_ARCH}"
        nvrtc.nvrtcCompileProgram(program, len(options), options)
        code = ctypes.create_string_buffer(nvrtc.nvrtcGetPTXSize(program))
        nvrtc.nvrtcGetPTX(program, code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code.raw


FAMILY = Family(linear, unavailable)
