"""Tokens a second of `generate` on left-padded batches, beside transformers' GlmForCausalLM on the same tensors.

Rows of a batch are from half of --length to all of it; every row generates --new tokens.
"""

import statistics

import torch
from common import contenders, in_turns, machine, model_arguments, random_model, ratio, record


def arguments(parser):
    model_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])


def batch_of(size, length, device):
    """ids and mask, int [B, T], padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (size, length), generator=generator)
    padding = torch.linspace(0, length // 2, size).long()[:, None]
    mask = (torch.arange(length) >= padding).long()
    return (ids * mask).to(device), mask.to(device)


def run(args):
    dtype = getattr(torch, args.dtype)
    model = random_model(args.shape, dtype, args.device, args.layers)
    limits, rows = machine(dtype, args.device), []
    models = contenders(model)
    settings = {"min_new_tokens": args.new, "max_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
    for size in args.batches:
        ids, mask = batch_of(size, args.length, args.device)
        works = {
            name: lambda model=model, ids=ids, mask=mask: model.generate(ids, attention_mask=mask, **settings)
            for name, model in models.items()
        }
        times = in_turns(works, args.rounds, args.device)
        rate = {name: round(size * args.new / statistics.median(record), 1) for name, record in times.items()}
        rows.append({"batch": size, "ours": rate["ours"], "glm": rate["glm"], "ratio": ratio(times)})
    record("throughput", args, limits, rows=rows)
