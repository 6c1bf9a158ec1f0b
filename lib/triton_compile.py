"""Compile the Triton kernels ahead of time, for cards that need not be present."""

import torch
from chatglm2 import attention_triton, inference_triton, quantization_triton

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compile_triton(capability, rows, bits, dtype, group=0):
    """Return (kernel name, its Tile, the build) that `quantization_triton` chooses; no GPU is needed."""
    kernels, width, out = quantization_triton.kernels(), 2048, 4096
    name, launch = quantization_triton.plan(rows, out, width, bits, dtype, group, torch.device("cpu"))
    constants = dict(launch.keywords)
    if "PTX" in constants:
        constants["PTX"] = quantization_triton.PTX[bits, dtype]
    types = dict.fromkeys(("x_ptr", "scale_ptr", "bias_ptr", "y_ptr"), POINTERS[dtype]) | {"weight_ptr": "*i8"}
    return (
        name,
        quantization_triton.tile_for(name, rows, out, bits),
        build(kernels[name], capability, constants, types, aligned=("width", "out")),
    )


def compile_attention(capability, tokens, dtype):
    """Return the builds of `attention_triton` for ChatGLM2-6B: one stretch of several, and combining them."""
    shape, block = attention_triton.constants(32, 2, tokens, 128)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "y_ptr"), POINTERS[dtype])
    pointers |= {"mask_ptr": "*u8", "sums_ptr": "*fp32", "states_ptr": "*fp32", "scaling": "fp32"}
    strides = ["q_b", "q_h", "q_t", "k_b", "k_g", "k_s", "v_b", "v_g", "v_s"]
    stretch = {**shape, **block, **attention_triton.OPTIONS}
    return [
        build(attention_triton.kernels()["stretch"], capability, stretch, pointers, strides),
        build(attention_triton.kernels()["combine"], capability, {**shape, **attention_triton.OPTIONS}, pointers),
    ]


def compile_inference(capability, dtype):
    """Return the builds of `inference_triton` for ChatGLM2-6B by name."""
    kernels, options = inference_triton.kernels(), inference_triton.OPTIONS
    half, angles = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), POINTERS[dtype]), ("cos_ptr", "sin_ptr")
    constants = {
        "rms_norm": {"BLOCK_C": 4096, "num_warps": 16},
        "rotate": {"HALF": 64, "PAIRS": inference_triton.PAIRS},
        "gated": {"CHANNELS": inference_triton.CHANNELS},
    }
    types = half | dict.fromkeys(angles, "*fp32") | {"eps": "fp32"}
    builds = {}
    for name, more in constants.items():
        aligned = [p.name for p in kernels[name].params if not (p.is_constexpr or p.do_not_specialize)]
        aligned = [name for name in aligned if name not in types]  # of the released shapes
        builds[name] = build(kernels[name], capability, {**options, **more}, types, aligned)
    return builds


def build(kernel, capability, constants, types, aligned=()):
    """`constants` are the kernel's and Triton's; pointers and `aligned` arguments are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    options = {key: value for key, value in constants.items() if key not in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if name.endswith("_ptr") or name in aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants = {(names.index(name),): value for name, value in constants.items() if name in names}
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)
