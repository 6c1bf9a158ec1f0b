"""Peak memory above the model: of a prefill by prompt length, and of a training step.

The prompt is processed at once, and in chunks (`prefill_chunk_size`); a training step is forward, loss and backward of
one sequence in float32, with and without gradient checkpointing (gradients are allocated before). On a CPU, memory is
the resident memory of the process (Linux).
"""

import torch
from common import cache_bytes, contenders, machine, model_arguments, peak_bytes, random_ids, random_model, record


def arguments(parser):
    model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--training-length", type=int, default=2048, help="0: no training step")


def prompt_pass(model, length, chunk=None):
    """Work that generates one token from a prompt of `length`."""
    ids = random_ids(model, length)
    settings = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": chunk}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def training_step(model, length):
    ids = random_ids(model, length)

    def work():
        model(input_ids=ids, labels=ids).loss.backward()

    return work


def megabytes(size):
    return round(size / 1e6, 1)


def run(args):
    dtype = getattr(torch, args.dtype)
    limits = machine(dtype, args.device)
    model, rows, training = random_model(args.shape, dtype, args.device, args.layers), [], {}
    models = contenders(model)
    for each in models.values():
        prompt_pass(each, 64)()
    for length in args.lengths:
        row = {"length": length, "cache_mb": megabytes(cache_bytes(model, length))}
        row["ours_mb"] = megabytes(peak_bytes(prompt_pass(model, length), args.device))
        row["chunked_mb"] = megabytes(peak_bytes(prompt_pass(model, length, args.chunk), args.device))
        row["glm_mb"] = megabytes(peak_bytes(prompt_pass(models["glm"], length), args.device))
        rows.append(row)
    if args.training_length:
        del model, models, each
        for name in ("ours", "glm"):
            trained = contenders(random_model(args.shape, torch.float32, args.device, args.layers), [name])[name]
            trained.train().requires_grad_(True)
            for checkpointing in (False, True):
                if checkpointing:
                    trained.gradient_checkpointing_enable()
                training_step(trained, 64)()  # the gradients themselves are there from now on
                peak = peak_bytes(training_step(trained, args.training_length), args.device)
                training[f"{name}_checkpointing_mb" if checkpointing else f"{name}_mb"] = megabytes(peak)
    record("memory", args, limits, rows=rows, training=training)
