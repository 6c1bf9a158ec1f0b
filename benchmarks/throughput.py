"""Tokens/s of left-padded batches and of continuous batching, compared with GlmForCausalLM on the same tensors.

Prompts are between half of --length and all of it; each row generates --new tokens. Padded batches use `generate`;
continuous batching (`generate_batch`) needs no padding and keeps pages of one cache.
"""

import statistics
from functools import partial

import torch
from common import contenders, in_turns, machine, model_arguments, random_model, ratio, record
from transformers import ContinuousBatchingConfig, GenerationConfig

PAGE = 256  # tokens


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


def padded(model, ids, mask, config):
    ids = model.generate(ids, attention_mask=mask, generation_config=config)
    assert ids.shape[1] == mask.shape[1] + config.max_new_tokens


def continuous(model, ids, mask, config):
    prompts = [row[held.bool()].tolist() for row, held in zip(ids, mask)]
    pages = len(prompts) * -(-(ids.shape[1] + config.max_new_tokens) // PAGE)
    # by itself it takes most of the memory for its cache, and goes through all of that
    pool = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages + 2, max_batch_tokens=512)
    results = model.generate_batch(prompts, config, continuous_batching_config=pool, progress_bar=False)
    assert all(len(result.generated_tokens) == config.max_new_tokens for result in results.values())


def run(args):
    dtype = getattr(torch, args.dtype)
    model = random_model(args.shape, dtype, args.device, args.layers)
    limits, rows = machine(dtype, args.device), []
    models = contenders(model)
    endless = {"eos_token_id": 1 << 20, "pad_token_id": 0}  # an id that the model does not have
    config = GenerationConfig(max_new_tokens=args.new, do_sample=False, **endless)
    for size in args.batches:
        ids, mask = batch_of(size, args.length, args.device)
        works = {
            (way, name): partial(way, model, ids, mask, config)
            for way in (padded, continuous)
            for name, model in models.items()
        }
        times = in_turns(works, args.rounds, args.device)
        row = {"batch": size}
        for way, ours, glm, faster in (
            (padded, "ours", "glm", "ratio"),
            (continuous, "continuous", "glm_continuous", "continuous_ratio"),
        ):
            seconds = {name: times[way, name] for name in models}
            row[ours], row[glm] = (round(size * args.new / statistics.median(seconds[name]), 1) for name in seconds)
            row[faster] = ratio(seconds)
        rows.append(row)
    record("throughput", args, limits, rows=rows)
