"""Calibration: int4 and int8 weights that keep what a layer computes, not what it holds, in the same format.

Rounding to nearest minimizes the error of each weight. `round_calibrated` minimizes that of the layer's outputs on the
inputs X that given texts cause, |X W^T - X Q^T|^2 = tr((W - Q) H (W - Q)^T) with H = X^T X:

1. A row's scale, smaller than max|w| / 7, is searched with the errors of its weights weighed by H's diagonal.
2. The columns are rounded one by one, and those still to come make up for each one's error: GPTQ (Frantar et al., 2022,
   arXiv:2210.17323), the largest of H's diagonal first.
3. Each integer is chosen anew with the others fixed, by coordinate descent (Behdin et al., 2023, arXiv:2309.01885),
   in turns with the scale that is then best for the row. No step increases the error.

`calibrate` does so block by block. A layer's inputs come through the layers before it as quantized, so that each makes
up for the errors before it, too. Memory: the model, one block in float32, its inputs, and four matrices like H.
"""

import hashlib
import os
import re
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantization_format import RANGE, dequantize_weight, in_format, search_scale
from .transformers_compat import progress_bar

LENGTH = 2048  # tokens of a sample; longer ones are divided
BLOCK = 128  # columns whose errors are applied to the others together
DAMPING = 0.01  # of H's mean diagonal, added to H
SWEEPS = 2  # of coordinate descent over all columns


# ---- the samples ----------------------------------------------------------------------------------------------------


def samples_for(model: nn.Module, calibration, tokenizer, empty_init: bool) -> List[Tensor]:
    """`sample_ids` for this model, [] without calibration; ValueError where it cannot be calibrated."""
    if calibration is None:
        if tokenizer is not None:
            raise ValueError("tokenizer is for the texts of calibration, but calibration is None")
        return []
    if empty_init:
        raise ValueError("calibration needs the values of the weights: load the float checkpoint, without empty_init")
    if model.config.pre_seq_len:
        raise ValueError(
            f"pre_seq_len={model.config.pre_seq_len}: calibrate the model without its P-Tuning prefix, and train that "
            "on the quantized weights"
        )
    return sample_ids(calibration, tokenizer, model.config.padded_vocab_size)


def sample_ids(calibration, tokenizer, vocab_size: int) -> List[Tensor]:
    """The samples as token ids, int64 [T] each. `calibration` is a list; each item is one of three forms:

    a text, messages ([{"role": ..., "content": ...}, ...]), which go through the chat template, or token ids.
    Raises ValueError, naming the item, for anything else, for ids outside the vocabulary, or without a tokenizer.
    """
    if isinstance(calibration, (str, bytes, dict)) or not hasattr(calibration, "__len__") or not len(calibration):
        raise ValueError(
            f"calibration={calibration!r:.80}: give a list of samples, a few hundred texts, lists of messages or lists "
            f"of token ids"
        )
    samples = []
    for i, item in enumerate(calibration):
        try:
            ids = _ids(item, tokenizer)
        except Exception as error:  # a chat template raises jinja2's
            raise ValueError(f"calibration[{i}]: {error}") from error
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"calibration[{i}] has ids from {ids.min()} to {ids.max()}, but the vocabulary has ids 0 "
                             f"to {vocab_size - 1}: was it encoded by another tokenizer?")  # fmt: skip
        samples += [part for part in ids.split(LENGTH) if len(part)]
    if not samples:
        raise ValueError(f"the {len(calibration)} items of calibration are empty")
    return samples


def _ids(item, tokenizer) -> Tensor:
    text = isinstance(item, str)
    messages = isinstance(item, (list, tuple)) and len(item) > 0 and isinstance(item[0], dict)
    if (text or messages) and tokenizer is None:
        raise ValueError("texts and messages need a tokenizer: give tokenizer=..., or token ids")
    if text:
        item = tokenizer(item)["input_ids"]
    elif messages:
        item = tokenizer.apply_chat_template(item, return_dict=False)
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or ids.dim() != 1 or ids.is_floating_point() and len(ids):
        raise ValueError(f"{item!r:.80} is not a text, a list of messages or a list of token ids")
    return ids.to("cpu", torch.int64)


# ---- one layer ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def round_calibrated(
    weight: Tensor, moments: Tensor, bits: int, group_size: Optional[int] = None, tick=lambda: None
) -> Tuple[Tensor, Tensor]:
    """`quantize_weight` for a layer whose inputs X [N, in] have the second moments X^T X: float32 [in, in].

    Returns (int8 weight in the released packing, scale in the weight's dtype). `tick` is called between steps.
    """
    low, high = RANGE[bits]
    scale = search_scale(weight, bits, group_size, moments.diagonal())  # [out, groups]
    order, hessian = _ordered(moments)
    w = weight.float().t()[order].contiguous()  # [in, out], as the columns are visited; so are the others
    scales = scale.float().t().repeat_interleave(len(w) // scale.shape[1], dim=0)[order].contiguous()
    q = _gptq(w.clone(), scales, hessian, low, high, tick)
    target, product = hessian @ w, hessian @ (q * scales)
    for _ in range(SWEEPS):
        if group_size is None:
            scale = _best_scale(w, q, product, scales[0]).to(weight.dtype)
            product *= torch.where(scales[0] == 0, 0, scale / scales[0])
            scales, scale = scale.float().expand_as(w), scale[:, None]
        _descend(q, scales, target, product, hessian, low, high, tick)
    back = torch.empty_like(q)
    back[order] = q
    return in_format(back.t().to(torch.int8).contiguous(), scale, bits, group_size)


def _ordered(moments: Tensor) -> Tuple[Tensor, Tensor]:
    """(the order of the columns, H in that order, damped)."""
    order = moments.diagonal().argsort(descending=True)
    hessian = moments[order][:, order]
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(torch.where(mean > 0, mean * DAMPING, 1))
    return order, hessian


def _inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with U^T U = H^-1. Row c tells how the columns after c make up for an error in c."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    extra = hessian.diagonal().mean() * DAMPING
    while failed:  # too few samples for so many columns, in float32
        extra = extra * 10
        factor, failed = torch.linalg.cholesky_ex(hessian + torch.diag(extra.expand(len(hessian))))
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


def _gptq(w: Tensor, scale: Tensor, hessian: Tensor, low: int, high: int, tick) -> Tensor:
    """Integers q, float32 [in, out], for w [in, out], which is overwritten, with the scale [in, out] of each."""
    factor, q = _inverse_factor(hessian), torch.empty_like(w)
    safe = torch.where(scale == 0, 1, scale)
    for i in range(0, len(w), BLOCK):
        j = min(i + BLOCK, len(w))
        errors = torch.empty_like(w[i:j])
        for c in range(i, j):
            q[c] = (w[c] / safe[c]).round_().clamp_(low, high)
            errors[c - i] = (w[c] - q[c] * scale[c]) / factor[c, c]
            w[c + 1 : j].addr_(factor[c, c + 1 : j], errors[c - i], alpha=-1)
        w[j:].addmm_(factor[i:j, j:].t(), errors, alpha=-1)
        tick()
    return q


def _best_scale(w: Tensor, q: Tensor, product: Tensor, scale: Tensor) -> Tensor:
    """The scale [out] of each row with the least error for these integers, where `product` is H (q * scale)."""
    square = (product * q).sum(0)
    return torch.where(square > 0, (product * w).sum(0) / square, scale)


def _descend(q, scale, target, product, hessian, low, high, tick) -> None:
    """One sweep of coordinate descent: each of the integers q, float32 [in, out], is chosen anew, in place.

    `target` is H w, and `product` H (q * scale), which is kept up to date.
    """
    safe = torch.where(scale == 0, 1, scale)
    for i in range(0, len(q), BLOCK):
        j = min(i + BLOCK, len(q))
        near, gradient, steps = hessian[i:j, i:j], target[i:j] - product[i:j], torch.empty_like(q[i:j])
        for c in range(j - i):
            new = (q[i + c] + gradient[c] / near[c, c] / safe[i + c]).round_().clamp_(low, high)
            steps[c] = (new - q[i + c]) * scale[i + c]
            q[i + c] = new
            gradient[c + 1 :].addr_(near[c, c + 1 :], steps[c], alpha=-1)
        product.addmm_(hessian[:, i:j], steps)
        tick()


# ---- the model ------------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """Ends a forward pass where no more of it is needed."""


class _Linear:
    """Stands in for a layer's `forward`: multiplies in float32, on a CPU many times as fast as in float16."""

    def __init__(self, layer: nn.Linear):
        self.weight, self.moments = layer.weight.detach().float(), None
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.float()
        if self.moments is not None:
            rows = rows.flatten(0, -2)
            self.moments.addmm_(rows.t(), rows)
            raise _Reached
        return F.linear(rows, self.weight, self.bias).to(x.dtype)


@contextmanager
def _attribute(module: nn.Module, name: str, value):
    """Hide an attribute of a module behind one of the instance, and put back what was there."""
    before = vars(module).get(name)
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(module, name)
        else:
            object.__setattr__(module, name, before)


@torch.no_grad()
def _inputs_of(block: nn.Module, model: nn.Module, samples: List[Tensor], tick) -> List[Tuple[tuple, dict]]:
    """What `block` is called with, (args, kwargs), for each sample."""
    calls, device = [], model.get_input_embeddings().weight.device

    def keep(*args, **kwargs):
        calls.append((args, kwargs))
        raise _Reached

    with _attribute(block, "forward", keep):
        for ids in samples:
            with suppress(_Reached):
                model(input_ids=ids[None].to(device), use_cache=False)
            tick()
    return calls


class Progress:
    """The layers that are done, in a folder, for a calibration that was stopped. Without a folder it keeps nothing.

    A layer's file has a name by what its values depend on: the samples, its weight and format, and those before it.
    """

    def __init__(self, folder: Optional[str], samples: List[Tensor]):
        self.folder, self.key = folder, hashlib.sha256()
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
            for sample in samples:
                self._add(sample)

    def _add(self, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        self.key.update(f"{data.dtype} {list(data.shape)} ".encode())
        self.key.update(data.view(torch.uint8).numpy())

    def rounded(self, layer: nn.Linear, bits: int, group_size: Optional[int], compute, skip) -> Tuple[Tensor, Tensor]:
        """(packed weight, scale) of the next layer: `compute()`, or what is in its file, after `skip()`."""
        if self.folder is None:
            return compute()
        self._add(layer.weight)
        self.key.update(f"int{bits} {group_size} ".encode())
        path = os.path.join(self.folder, f"{self.key.hexdigest()}.pt")
        if os.path.exists(path):
            skip()
            return tuple(torch.load(path, map_location=layer.weight.device, weights_only=True))
        rounded = compute()
        torch.save([tensor.cpu() for tensor in rounded], f"{path}.part")
        os.replace(f"{path}.part", path)
        return rounded


def calibrate(
    model: nn.Module, chosen: Dict[str, Tuple[int, Optional[int]]], samples: List[Tensor], folder: Optional[str] = None
) -> Iterator[Tuple[str, Tuple[Tensor, Tensor]]]:
    """Yield (name, (packed weight, scale)) for each layer {name: (bits, group_size)}, a block at a time, in order.

    What is done is kept in `folder`, and read from it. Once a block's layers are yielded, they may be replaced. Raises
    ValueError if a layer's inputs are not finite.
    """
    if not chosen:
        return
    blocks: Dict[str, List[str]] = {}
    for name in chosen:
        blocks.setdefault(re.match(r"(.*\blayers\.\d+)\.", name).group(1), []).append(name)
    steps = [_steps(model.get_submodule(name)) for name in chosen]
    total = len(samples) * (1 + len(chosen) + len(blocks)) + sum(steps)
    ticks = iter(progress_bar(range(total), "Calibrating"))
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        progress = Progress(folder, samples)
        yield from _calibrate(model, blocks, chosen, samples, progress, lambda: next(ticks, None))
    finally:
        for name, module in model.named_modules():  # the quantized layers, too
            module.training = modes.get(name, module.training)


def _steps(layer: nn.Linear) -> int:
    """How often `round_calibrated` ticks."""
    return -(-layer.weight.shape[1] // BLOCK) * (1 + SWEEPS)


def _calibrate(model, blocks, chosen, samples, progress, tick):
    prefix, _, first = next(iter(blocks)).rpartition(".")
    last = int(list(blocks)[-1].rpartition(".")[2])
    calls = None
    for i in range(int(first), last + 1):
        block, names = model.get_submodule(f"{prefix}.{i}"), blocks.get(f"{prefix}.{i}", ())
        if calls is None:
            calls = _inputs_of(block, model, samples, tick)
        layers = {name: model.get_submodule(name) for name in names}
        linears, rounded = {name: _Linear(layer) for name, layer in layers.items()}, {}
        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(_attribute(layer, "forward", linears[name]))
            for name, layer in layers.items():
                compute = partial(_round, name, layer, linears[name], block, calls, *chosen[name], tick)
                skip = partial(_skip, len(calls) + _steps(layer), tick)
                rounded[name] = progress.rounded(layer, *chosen[name], compute, skip)
                linears[name].weight = dequantize_weight(*rounded[name], chosen[name][0], torch.float32)
            if i < last:
                _advance(block, calls, tick)
        del linears
        for name in names:
            yield name, rounded.pop(name)


def _skip(steps, tick):
    for _ in range(steps):
        tick()


@torch.no_grad()
def _advance(block, calls, tick):
    """Replace the inputs of `block` in `calls` by its outputs, which are the next one's inputs."""
    for i, (args, kwargs) in enumerate(calls):
        calls[i] = ((block(*args, **kwargs)[0], *args[1:]), kwargs)
        tick()


@torch.no_grad()
def _round(name, layer, linear, block, calls, bits, group_size, tick):
    """(packed weight, scale) of one layer of `block`, for the inputs that its stand-in `linear` gets."""
    size = linear.weight.shape[1]
    linear.moments = linear.weight.new_zeros(size, size)
    for args, kwargs in calls:
        with suppress(_Reached):
            block(*args, **kwargs)
        tick()
    moments, linear.moments = linear.moments, None
    if not moments.isfinite().all():
        raise ValueError(f"{name}: its inputs are nan or inf on these samples: try the model in float32 or bfloat16")
    return round_calibrated(layer.weight.detach(), moments, bits, group_size, tick)
