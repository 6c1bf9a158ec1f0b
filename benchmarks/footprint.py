"""Memory of int4 and int8 at the 6.2B shapes: the model, a prompt of 2,048 tokens, an answer at 8,192.

A peak is the model and the increase above it: memory allocated on a GPU, resident memory on a CPU (Linux). Activations
are in half precision.
"""

import torch
from common import filled_cache, machine, peak_bytes, random_model, record
from decode import step
from memory import prompt_pass


def arguments(parser):
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8])
    parser.add_argument("--small-head", action="store_true", help="the embedding and the output layer in int8 too")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)


def run(args):
    dtype, options = getattr(torch, args.dtype), {}
    limits = machine(dtype, args.device)
    if args.small_head:
        options["quantization_options"] = {"embedding": True, "output_layer": True}
    model = random_model("6b", dtype, args.device, args.layers, quantization_bit=args.bits, **options)
    prompt_pass(model, 64)()  # from now on the weights are in their kernel's layout
    size = model.get_memory_footprint(return_buffers=False)

    def answer():
        step(model, filled_cache(model, args.context - 1))()

    works = {"prompt": prompt_pass(model, args.prompt), "answer": answer}
    peaks = {f"{name}_gb": round((size + peak_bytes(work, args.device)) / 1e9, 2) for name, work in works.items()}
    record("footprint", args, limits, model_gb=round(size / 1e9, 2), **peaks)
