"""Time to the first token by prompt length, compared with transformers' GlmForCausalLM on the same tensors.

`share` is the fraction of the measured matrix-product rate that the prefill reaches, counting its matrix products and
causal attention.
"""

import torch
from common import contenders, in_turns, machine, milliseconds, model_arguments, random_ids, random_model, ratio, record


def arguments(parser):
    model_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192])


def operations(model, length):
    """Multiplications and additions of a prompt's pass: the blocks' weights, causal attention, one row of scores."""
    config = model.config
    blocks = sum(p.numel() for p in model.transformer.encoder.layers.parameters() if p.dim() == 2)
    attention = config.num_layers * config.num_attention_heads * config.kv_channels * length * length
    return 2 * blocks * length + 2 * attention + 2 * model.transformer.output_layer.weight.numel()


def first_token(model, length):
    ids = random_ids(model, length)

    @torch.no_grad()
    def work():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return work


def run(args):
    dtype = getattr(torch, args.dtype)
    model = random_model(args.shape, dtype, args.device, args.layers)
    limits, rows = machine(dtype, args.device), []
    models = contenders(model)
    for length in args.lengths:
        works = {name: first_token(contender, length) for name, contender in models.items()}
        times = in_turns(works, args.rounds, args.device)
        ours = milliseconds(times["ours"])
        share = operations(model, length) / ours / 1e6 / limits["matmul_gflop_per_second"]
        glm = milliseconds(times["glm"])
        rows.append({"length": length, "ours_ms": ours, "glm_ms": glm, "ratio": ratio(times), "share": round(share, 3)})
    record("prefill", args, limits, rows=rows)
