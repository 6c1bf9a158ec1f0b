"""The part of a decode step at the 6.2B shapes that is neither matrix product nor attention.

Matrix products and attention of one step are timed separately, on a step's inputs, in turns with the whole step. The
rest is overhead: norms, rotary embedding, activation, cache, Python. Products of quantized layers in C are prepared
calls, without Python. Attention, and other kernels, are called through Python, which here counts for them.

--modules times the step of the modules too, without the C code that computes all blocks in one call.
"""

import statistics
from functools import partial

import torch
from common import c_library, filled_cache, in_turns, machine, milliseconds, quantization, random_model, ratio, record
from decode import step
from torch import nn


def arguments(parser):
    parser.add_argument("--bits", type=int, default=16, choices=[4, 8, 16])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--modules", action="store_true")
    parser.add_argument("--instructions", choices=["avx2"], help="the C kernels as for a CPU without AVX512")
    parser.add_argument("--small-head", action="store_true", help="the embedding and the output layer in int8 too")


def prepared(layer, x):
    """A call of the C product of a quantized layer with one token."""
    from chatglm2 import quantization_cpu

    k, out, threads = layer.in_features, layer.out_features, torch.get_num_threads()
    groups, group = quantization_cpu.groups_of(layer.weight_scale, k)
    scratch = torch.empty(quantization_cpu.scratch_bytes(1, k, groups, group, threads, x.dtype), dtype=torch.int8)
    tensors = x, x.new_empty(out), layer.weight, layer.weight_scale, layer.bias, scratch
    types = (quantization_cpu.TYPES[t.dtype] for t in (x, layer.weight_scale))
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    arguments = *addresses, 1, k, out, groups, group, layer.bits, *types, threads
    function = quantization_cpu.load_library()[0].linear

    def call(held=tensors):  # as long as their addresses are used
        function(*arguments)

    return call


def bare_work(model, cache):
    """The step's matrix products and its attention, and nothing else."""
    from chatglm2.attention_chatglm import choose_attention

    config, device = model.config, model.device
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = {
        layer.in_features: torch.randn(1, 1, layer.in_features, device=device).to(model.dtype) for layer in linears
    }
    query = torch.randn(1, config.num_attention_heads, 1, config.kv_channels, device=device).to(model.dtype)

    with torch.no_grad():
        attend = choose_attention(config, query, None)
    name = quantization.choose("auto", device)
    kernel, products = quantization.family(name), []
    for layer in linears:
        x = inputs[layer.in_features]
        if not isinstance(layer, quantization.QuantizedLinear):
            products.append(partial(layer, x))
        elif name == "cpu" and model.dtype != torch.float32:
            products.append(prepared(layer, x[0]))
        else:
            multiply = kernel.layout.linear if layer._weights.layout else kernel.linear
            products.append(partial(multiply, x[0], layer.weight, layer.weight_scale, layer.bias, layer.bits))

    @torch.no_grad()
    def work():
        for product in products:
            product()
        for layer in cache.layers:
            attend(None, query, layer.keys, layer.values, None, scaling=config.kv_channels**-0.5)

    return work


def by_modules(work):
    """The same work, the blocks computed by their modules."""
    from chatglm2 import modeling_chatglm

    def without():
        in_c = modeling_chatglm.blocks_at_once.pop("cpu")
        try:
            work()
        finally:
            modeling_chatglm.blocks_at_once["cpu"] = in_c

    return without


def run(args):
    if args.instructions:
        c_library.instructions = lambda: [(args.instructions, c_library.FLAGS)]
    dtype = getattr(torch, args.dtype)
    small = {"embedding": True, "output_layer": True} if args.small_head else {}
    quantized = {"quantization_bit": args.bits, "quantization_options": small} if args.bits < 16 else {}
    model = random_model("6b", dtype, args.device, args.layers, **quantized)
    limits = machine(dtype, args.device)
    cache = filled_cache(model, args.context)
    works = {"step": step(model, cache)}
    works["step"]()  # it lays weights out
    works["bare"] = bare_work(model, cache)
    if args.modules:
        works["modules"] = by_modules(works["step"])
    times = in_turns(works, args.rounds, args.device, warmup=2)
    result = {f"{name}_ms": milliseconds(times[name]) for name in works}
    share = statistics.median(bare / step for bare, step in zip(times["bare"], times["step"]))
    result["overhead"] = round(1 - share, 3)
    if args.modules:
        result["modules_ratio"] = ratio(times, base="step", other="modules")
    record("overhead", args, limits, **result)
