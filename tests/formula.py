"""Weights by an exact integer formula, the same on every machine: a case needs no tensor file."""

import numpy as np
import torch


def formula_tensor(shape, amplitude, seed, offset):
    """offset + amplitude * u, u in [-1, 1) from a hash of each row-major index; float32."""
    x = (np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed * 1000003)).astype(np.uint64)
    for multiplier, shift in ((2654435761, 15), (2246822519, 13), (3266489917, 16)):
        x = (x * np.uint64(multiplier)) & np.uint64(0xFFFFFFFF)
        x ^= x >> np.uint64(shift)
    values = offset + amplitude * (x.astype(np.float64) / 2.0**31 - 1.0)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def formula_weights(spec):
    """The state dict that the description of a golden chat gives: tensors, then rows zeroed and rows copied."""
    state = {name: formula_tensor(t["shape"], t["a"], t["seed"], t["off"]) for name, t in spec["tensors"].items()}
    head = state["transformer.output_layer.weight"]
    for first, last in spec["zero_rows"]:
        head[first:last] = 0
    for row, copied in spec["copy_rows"].items():
        head[int(row)] = head[copied["source"]] * copied["scale"]
    return state
