"""torch's own operators for int8 and int4: every way they are multiplied, on this CPU and as on others."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chatglm2 import quantization_stock
from chatglm2.quantization import QuantizedLinear, dequantize_weight, laid_out_by, quantize_weight, reference_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_layout = pytest.mark.skipif(
    not quantization_stock.rows_of_a_block(), reason="this torch has no fast int4 product on this CPU"
)
needs_vector_loops = pytest.mark.skipif(
    not quantization_stock.has_vector_loops(), reason="this torch has no bfloat16 product in vector code"
)
needs_products = pytest.mark.skipif(
    not quantization_stock.multiplies_exactly(8), reason="this torch or this CPU has no exact int8 product"
)
# Relative error by the way taken: bfloat16's rounding, two int8 terms and the output's rounding, one int8 term
LIMIT = {"layout": 4e-3, "bfloat16": 4e-3, "two integer": 3e-3, "one integer": 1.2e-2, "float32": 3e-3}


def inputs(n, bits, dtype, group_size=None, outliers=False, out=192, k=512):
    """x [n, k], weight, weight_scale, bias, bits."""
    torch.manual_seed(n)
    weight, scale = quantize_weight(torch.randn(out, k).to(dtype), bits, group_size)
    x = torch.randn(n, k)
    if outliers:
        x[:, torch.randperm(k)[:8]] *= 30
    return x.to(dtype), weight, scale, torch.randn(out).to(dtype), bits


def relative_error(y, x, weight, scale, bias, bits):
    want = reference_linear(x.double(), weight, scale.double(), bias.double(), bits)
    return ((y.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("way, bits", [
    pytest.param("layout", 4, marks=needs_layout),
    *(pytest.param("bfloat16", bits, marks=needs_vector_loops) for bits in (8, 4)),
    *(pytest.param(f"{count} integer", bits, marks=needs_products) for count in ("two", "one") for bits in (8, 4)),
    *(("float32", bits) for bits in (8, 4)),
])  # fmt: skip
def test_every_way_agrees_with_the_reference(way, bits, monkeypatch):
    monkeypatch.setattr(quantization_stock, "has_vector_loops", lambda: way in ("layout", "bfloat16"))
    monkeypatch.setattr(quantization_stock, "FEW_INTEGERS", 99 if way == "two integer" else 0)
    monkeypatch.setattr(quantization_stock, "multiplies_integers", lambda bits: way != "float32")
    for dtype in DTYPES:
        for n in (1, 3, 12):
            for outliers in (False, True):
                x, weight, *rest = inputs(n, bits, dtype, outliers=outliers)
                if way == "layout":
                    weight = quantization_stock.to_layout(weight, bits)
                y = quantization_stock.linear(x, weight, *rest)
                assert y.shape == (n, 192) and y.dtype == dtype
                if weight.dtype == torch.uint8:
                    weight = quantization_stock.from_layout(weight, 192, 512, bits)
                limit = 1e-5 if dtype == torch.float32 else LIMIT[way]
                assert relative_error(y, x, weight, *rest) < limit, (dtype, n, outliers)


@needs_layout
@pytest.mark.parametrize("group_size", [None, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_takes_groups_and_any_number_of_tokens(group_size, dtype):
    for n in (0, 1, 48, 49, 257):
        x, weight, *rest = inputs(n, 4, dtype, group_size)
        assert quantization_stock.readable(192, 512, 4, group_size)
        y = quantization_stock.linear(x, quantization_stock.to_layout(weight, 4), *rest)
        assert y.shape == (n, 192) and y.dtype == dtype
        if n:  # as one int8 term from 49 tokens on; a scale of a group is rounded to bfloat16 before
            limit = 1e-5 if dtype == torch.float32 else 1.2e-2 if n > 48 else 5e-3
            assert relative_error(y, x, weight, *rest) < limit, n


@needs_layout
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_layout_is_the_released_packing_in_another_order(blocks, columns, seed):
    rows = quantization_stock.rows_of_a_block()
    weight = torch.empty(rows * blocks, 16 * columns, dtype=torch.int8)
    weight.random_(-128, 128, generator=torch.Generator().manual_seed(seed))
    layout = quantization_stock.to_layout(weight, 4)
    assert layout.dtype == torch.uint8 and layout.nbytes == weight.nbytes
    assert torch.equal(quantization_stock.from_layout(layout, rows * blocks, 32 * columns, 4), weight)


@needs_layout
def test_a_layer_holds_the_layout_alone_and_gives_the_released_packing():
    torch.manual_seed(0)
    linear = nn.Linear(96, 128).half()
    layer = QuantizedLinear.from_linear(linear, 4, backend="stock")
    weight, x = layer.weight.clone(), torch.randn(3, 96).half().requires_grad_()
    y = layer(x)
    assert laid_out_by(layer.weight) == "stock" and layer.weight.nbytes == weight.nbytes
    y.sum().backward()
    want = dequantize_weight(weight, layer.weight_scale, 4, torch.float32).sum(0)
    torch.testing.assert_close(x.grad.float(), want.expand(3, -1), rtol=2e-3, atol=2e-3)
    assert torch.equal(layer.state_dict()["weight"], weight) and laid_out_by(layer.weight) is None
    assert torch.equal(layer(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    layer.backend = "torch"
    layer._replace_weight(quantization_stock.to_layout(weight, 4))  # laid out by a family that is not asked any more
    torch.testing.assert_close(layer.half()(x), y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["auto", "stock", "torch"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_first_used_under_inference_mode_can_be_trained_on(backend, bits):
    layer = QuantizedLinear.from_linear(nn.Linear(96, 128).half(), bits, backend=backend)
    x = torch.randn(3, 96).half()
    with torch.inference_mode():
        y = layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    with torch.inference_mode():
        layer.state_dict()  # back in the released packing
    assert torch.equal(layer(x), y) and x.grad.isfinite().all() and x.grad.any()


@needs_products
@pytest.mark.parametrize("factor, taken", [(0.5, True), (3, True), (20, False)])
def test_integer_products_are_taken_where_they_pay(factor, taken, monkeypatch):
    """Not where torch has plain loops for them, which are exact and 20 times slower than float32."""
    seconds = iter((factor, 1))
    monkeypatch.setattr(quantization_stock, "_seconds", lambda work: next(seconds))
    assert quantization_stock.multiplies_integers.__wrapped__(8) is taken


PROGRAM = """
import json, sys, types
package = types.ModuleType("chatglm2"); package.__path__ = [sys.argv[1]]; sys.modules["chatglm2"] = package
import torch
from chatglm2 import quantization_stock as stock
from chatglm2.quantization import QuantizedLinear, reference_linear
torch.manual_seed(0)
worst = 0
for bits in (8, 4):
    linear = torch.nn.Linear(512, 192).half()
    linear.weight.data.uniform_(0.5, 1).mul_(torch.randn(192, 1).sign())  # large products of one sign
    layer = QuantizedLinear.from_linear(linear, bits, backend="stock")
    for n in (1, 3, 20, 60):
        x = torch.rand(n, 512).half()
        want = reference_linear(x.float(), layer.state_dict()["weight"], layer.weight_scale, layer.bias, bits)
        worst = max(worst, ((layer(x).float() - want).norm() / want.norm()).item())
found = stock.multiplies_exactly(8), stock.multiplies_exactly(4), stock.has_vector_loops(), stock.rows_of_a_block()
print(json.dumps([worst, *found]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="chooses the CPU's instructions by Linux builds' variables")
@pytest.mark.parametrize(
    "variable, value, expected",
    [
        ("ATEN_CPU_CAPABILITY", "avx2", ("vector loops", True, "rows", 32)),
        ("ATEN_CPU_CAPABILITY", "default", ("vector loops", False, "rows", 0)),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", ("exact int8", False, "exact int4", True)),
    ],
)
def test_other_cpus_get_right_values(variable, value, expected):
    """AVX2 alone, torch without vector code (as on Windows), and oneDNN without VNNI, whose int8 sums overflow."""
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1])]
    done = subprocess.run(command, env={**os.environ, variable: value}, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    worst, *found = json.loads(done.stdout)
    found = dict(zip(("exact int8", "exact int4", "vector loops", "rows"), found))
    assert worst < 1.2e-2
    has_all = quantization_stock.rows_of_a_block() == 64 and quantization_stock.multiplies_exactly(8)
    for name, want in zip(expected[0::2], expected[1::2]):
        assert found[name] == want or not has_all  # where this CPU has less, nothing was taken away
