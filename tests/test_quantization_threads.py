"""Quantized layers that are loaded, cast, saved and copied while other threads compute."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from chatglm2 import quantization
from chatglm2.quantization import QuantizedLinear
from quantization_helpers import BACKENDS, needs_compiled
from torch import nn


@pytest.mark.parametrize("backend", ["auto", "stock"])
@pytest.mark.parametrize("bits", [8, 4])
def test_concurrent_first_use_converts_the_layout_once(backend, bits):
    """The others find the layout and leave it as it is."""
    layer = QuantizedLinear.from_linear(nn.Linear(256, 192).half(), bits, backend=backend)
    weight, x = layer.weight.clone(), torch.randn(2, 256).half()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: layer(x), range(8)))
    layer.lay_out()
    assert all(torch.equal(y, layer(x)) for y in results)
    assert torch.equal(layer.state_dict()["weight"], weight)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_compiled), "stock"])
def test_saving_while_threads_compute_keeps_the_released_format(monkeypatch, backend):
    """A forward that starts between the conversion and the saving or copying waits until that is done."""
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 64), 4, backend=backend), torch.randn(2, 64)
    weight, y, release, threads = layer.weight.clone(), layer(x), QuantizedLinear._release, []

    def release_and_compute(self):
        released = release(self)
        threads.append(pool.submit(layer, x))
        time.sleep(0.05)
        return released

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(QuantizedLinear, "_release", release_and_compute)
        saved = layer.state_dict(), layer.state_dict(keep_vars=True), copy.deepcopy(layer)._parameters
        monkeypatch.undo()
    assert all(torch.equal(state["weight"], weight) for state in saved)
    assert list(saved[0]) == ["weight", "weight_scale", "bias"] and isinstance(saved[1]["weight"], nn.Parameter)
    assert len(threads) >= 3 and all(torch.equal(thread.result(), y) for thread in threads)


def compute_while(layer, x, change, times=20):
    """What eight threads get from layer(x) while this one calls `change` some times; an error in a thread is raised."""
    results, done = [], threading.Event()

    def compute():
        while not done.is_set():
            results.append(layer(x))

    with ThreadPoolExecutor(8) as pool:
        computing = [pool.submit(compute) for _ in range(8)]
        try:
            for i in range(times):
                change(i)
        finally:
            done.set()
        for thread in computing:
            thread.result()
    return results


@pytest.mark.parametrize("backend", [*BACKENDS])
def test_loading_while_threads_compute_never_mixes_two_checkpoints(backend):
    """Each result is one checkpoint's or the other's: weight, scale and bias change as one."""
    x = torch.randn(2, 64)
    one, other = (QuantizedLinear.from_linear(nn.Linear(64, 64), 4, backend=backend) for _ in range(2))
    states = [copy.deepcopy(layer.state_dict()) for layer in (one, other)]
    want = [one(x), other(x)]
    results = compute_while(one, x, lambda i: one.load_state_dict(states[(i + 1) % 2], assign=i % 4 > 1))
    assert len(results) >= 8 and all(torch.equal(y, want[0]) or torch.equal(y, want[1]) for y in results)
    assert torch.equal(one(x), want[0])


@pytest.mark.parametrize("backend", [*BACKENDS])
def test_casts_while_threads_compute(backend):
    """.float() and .half() in turns: each result is that of float16 or of float32 scales."""
    x = torch.randn(2, 64)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 64), 4, backend=backend)
    want = [copy.deepcopy(layer)(x), copy.deepcopy(layer).half()(x), copy.deepcopy(layer).half().float()(x)]
    results = compute_while(layer, x, lambda i: layer.half() if i % 2 else layer.float())
    assert len(results) >= 8 and all(any(torch.equal(y, w) for w in want) for y in results)


@pytest.mark.parametrize("backend", [*BACKENDS])
def test_saving_and_copying_while_threads_compute(backend):
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 64), 4, backend=backend), torch.randn(2, 64)
    weight, y = layer.weight.clone(), layer(x)
    saved = []
    results = compute_while(layer, x, lambda i: saved.extend([layer.state_dict(), copy.deepcopy(layer)._parameters]))
    assert all(torch.equal(state["weight"], weight) for state in saved)
    assert len(results) >= 8 and all(torch.equal(result, y) for result in results)


def test_embedding_loads_atomically_while_threads_compute():
    ids = torch.arange(9)
    one, other = (quantization.QuantizedEmbedding.from_embedding(nn.Embedding(9, 64)) for _ in range(2))
    states, want = [copy.deepcopy(layer.state_dict()) for layer in (one, other)], [one(ids), other(ids)]
    results = compute_while(one, ids, lambda i: one.load_state_dict(states[(i + 1) % 2]))
    assert len(results) >= 8 and all(torch.equal(y, want[0]) or torch.equal(y, want[1]) for y in results)
