"""Compile the Triton kernels ahead of time, for cards that need not be present."""

import torch
from chatglm2 import quantization_triton


def compile_triton(capability, rows, bits, dtype, group=0):
    """Return (kernel name, its Tile, the build) that `quantization_triton` chooses; no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernels, width, out = quantization_triton.kernels(), 2048, 4096
    name, launch = quantization_triton.plan(rows, out, width, bits, dtype, group, torch.device("cpu"))
    constants = launch.keywords
    if "PTX" in constants:
        constants = {**constants, "PTX": quantization_triton.PTX[bits, dtype]}
    options = {key: constants[key] for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    kernel, pointer = kernels[name], {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types_ = {key: pointer for key in ("x_ptr", "scale_ptr", "bias_ptr", "y_ptr")} | {"weight_ptr": "*i8"}
    types_ |= dict(rows="i32", width="i32", out="i32", has_bias="i32")
    names = kernel.arg_names
    signature = {n: types_.get(n, "constexpr") for n in names}
    aligned = [n for n in names if n.endswith("_ptr") or n in ("width", "out")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constants = {(names.index(n),): value for n, value in constants.items() if n not in options}
    source = ASTSource(kernel, signature, constants, attributes)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return name, quantization_triton.tile_for(name, rows, out, bits), built
