"""Products from torch's own operators: every method, on this CPU and as on others."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chatglm2 import quantization_stock
from chatglm2.quantization import QuantizedLinear, op
from chatglm2.quantization_format import dequantize_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_helpers import (
    DTYPES,
    all_but_outliers,
    assert_as_exact_as_the_reference,
    make,
    own_error,
    relative_error,
    with_outliers,
)
from torch import nn

needs_layout = pytest.mark.skipif(
    not quantization_stock.rows_of_a_block(), reason="this torch has no fast int4 product on this CPU"
)
needs_vector_loops = pytest.mark.skipif(
    not quantization_stock.has_vector_loops(), reason="this torch has no bfloat16 product in vector code"
)
needs_products = pytest.mark.skipif(
    not quantization_stock.multiplies_exactly(8), reason="this torch or this CPU has no exact int8 product"
)
# method -> the inputs that it multiplies, rounded
ROUNDED = {
    "layout": torch.Tensor.bfloat16,
    "bfloat16": torch.Tensor.bfloat16,
    "two integer": torch.Tensor.double,
    "one integer": all_but_outliers,
    "float32": torch.Tensor.double,
}


@pytest.mark.parametrize("method, bits", [
    pytest.param("layout", 4, marks=needs_layout),
    *(pytest.param("bfloat16", bits, marks=needs_vector_loops) for bits in (8, 4)),
    *(pytest.param(f"{count} integer", bits, marks=needs_products) for count in ("two", "one") for bits in (8, 4)),
    *(("float32", bits) for bits in (8, 4)),
])  # fmt: skip
def test_methods_are_as_exact_as_their_input_rounding(method, bits, monkeypatch):
    monkeypatch.setattr(quantization_stock, "has_vector_loops", lambda: method in ("layout", "bfloat16"))
    monkeypatch.setattr(quantization_stock, "FEW_INTEGERS", 99 if method == "two integer" else 0)
    monkeypatch.setattr(quantization_stock, "multiplies_integers", lambda bits: method != "float32")
    for dtype in DTYPES:
        for n in (1, 3, 12):
            for outliers in (False, True):
                x, weight, *rest = make(n, 512, 192, bits, dtype, seed=n)
                x = with_outliers(x) if outliers else x
                if method == "layout":
                    y = quantization_stock.linear_in_layout(x, quantization_stock.to_layout(weight, bits), *rest)
                else:
                    y = quantization_stock.linear(x, weight, *rest)
                assert y.shape == (n, 192) and y.dtype == dtype
                rounded = x if dtype == torch.float32 else ROUNDED[method](x)
                limit = 1.5 * own_error(rounded, x, weight, *rest) + 4 * torch.finfo(torch.float32).eps
                assert relative_error(y, x, weight, *rest) <= limit, (dtype, n, outliers)


@needs_layout
@pytest.mark.parametrize("group_size", [None, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_supports_groups_and_any_number_of_tokens(group_size, dtype):
    for n in (0, 1, 48, 49, 257):
        x, weight, *rest = make(n, 512, 192, 4, dtype, group_size)
        assert quantization_stock.fits_layout(192, 512, 4, group_size)
        y = quantization_stock.linear_in_layout(x, quantization_stock.to_layout(weight, 4), *rest)
        assert y.shape == (n, 192) and y.dtype == dtype
        if n:
            assert_as_exact_as_the_reference(y, "stock", x, weight, *rest)


@needs_layout
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_layout_reorders_the_released_packing(blocks, columns, seed):
    rows = quantization_stock.rows_of_a_block()
    weight = torch.empty(rows * blocks, 16 * columns, dtype=torch.int8)
    weight.random_(-128, 128, generator=torch.Generator().manual_seed(seed))
    layout = quantization_stock.to_layout(weight, 4)
    assert layout.dtype == torch.uint8 and layout.shape == quantization_stock.layout_shape(
        *layout.shape[:1], 32 * columns, 4
    )
    assert torch.equal(quantization_stock.from_layout(layout, rows * blocks, 32 * columns, 4), weight)


@needs_layout
def test_a_layer_keeps_only_the_layout_and_saves_the_released_packing():
    torch.manual_seed(0)
    linear = nn.Linear(96, 128).half()
    layer = QuantizedLinear.from_linear(linear, 4, backend="stock")
    weight, x = layer.weight.clone(), torch.randn(3, 96).half().requires_grad_()
    y = layer(x)
    assert layer._weights.layout == "stock" and layer.weight.nbytes == weight.nbytes
    y.sum().backward()
    want = dequantize_weight(weight, layer.weight_scale, 4, torch.float32).sum(0)
    torch.testing.assert_close(x.grad.float(), want.expand(3, -1), rtol=2e-3, atol=2e-3)
    assert torch.equal(layer.state_dict()["weight"], weight) and layer._weights.layout == ""
    assert torch.equal(layer(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    packed, scale = quantization_stock.to_layout(weight, 4), layer.half().weight_scale
    z = op(x, packed, scale, layer.bias, 4, "stock", "torch")  # a layout of another family than the one that computes
    torch.testing.assert_close(z, y, rtol=1e-2, atol=1e-2)


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
        layer.state_dict()  # converts it to the released packing
    assert torch.equal(layer(x), y) and x.grad.isfinite().all() and x.grad.any()


@needs_products
@pytest.mark.parametrize("factor, taken", [(0.5, True), (3, True), (20, False)])
def test_integer_products_are_used_where_they_are_fast(factor, taken, monkeypatch):
    """Not where torch has scalar loops for them, which are exact and 20 times slower than float32."""
    seconds = iter((factor, 1))
    monkeypatch.setattr(quantization_stock, "_seconds", lambda work: next(seconds))
    assert quantization_stock.multiplies_integers.__wrapped__(8) is taken


PROGRAM = """
import json, sys, types
package = types.ModuleType("chatglm2"); package.__path__ = [sys.argv[1]]; sys.modules["chatglm2"] = package
import torch
from chatglm2 import quantization_stock as stock
from chatglm2.quantization import QuantizedLinear
from chatglm2.quantization_format import reference_linear
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
    """AVX2 alone, torch without vectorized code (as on Windows), and oneDNN without VNNI, whose int8 sums overflow."""
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1])]
    done = subprocess.run(command, env={**os.environ, variable: value}, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    worst, *found = json.loads(done.stdout)
    found = dict(zip(("exact int8", "exact int4", "vector loops", "rows"), found))
    assert worst < 1.2e-2
    has_all = quantization_stock.rows_of_a_block() == 64 and quantization_stock.multiplies_exactly(8)
    for name, want in zip(expected[0::2], expected[1::2]):
        assert found[name] == want or not has_all  # a CPU that has less loses nothing
