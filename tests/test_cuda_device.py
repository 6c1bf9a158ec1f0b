"""The GPU kernels and attention on a GPU; test_quantization_triton.py and others like it need none."""

import pytest
import torch
from chatglm2 import attention_triton, quantization_cpm, quantization_triton
from chatglm2.attention_chatglm import eager_attention, sdpa_attention
from chatglm2.quantization import QuantizedLinear
from quantization_helpers import CUDA, FLOAT32_SUM, HALF_ULP, error, make
from test_attention_triton import CASES as MASKED
from test_attention_triton import errors
from test_attention_triton import make as make_masked
from test_quantization_triton import CASES, tolerance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_card(arguments):
    return [a.to(CUDA) if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("name", [name for name in CASES if "tile" not in CASES[name]])
def test_triton_linear(name):
    rows, columns, out, bits, dtype, group, bias = CASES[name]["shape"]
    dtype = getattr(torch, dtype)
    arguments = make(rows, columns, out, bits, dtype, group, bias)
    y = quantization_triton.linear(*on_card(arguments))
    again = quantization_triton.linear(*on_card(arguments))
    assert y.dtype == dtype and torch.equal(y, again)
    bound = tolerance(name) + 3 * FLOAT32_SUM  # tensor cores truncate float32 sums at about 2^-18
    assert error(y.cpu(), *arguments, ulps=1 if dtype == torch.bfloat16 else 0.5) < bound


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("rows", (1, 2, 5, 16, 17, 100, 300))
@pytest.mark.parametrize("out, columns", ((4608, 4096), (4096, 13696)))
def test_triton_linear_at_6b_shapes(bits, rows, out, columns):
    arguments = make(rows, columns, out, bits, torch.float16)
    y = quantization_triton.linear(*on_card(arguments))
    dequantized = rows > quantization_triton.FUSED_ROWS  # to x's dtype, for torch's product
    assert error(y.cpu(), *arguments) < 4 * FLOAT32_SUM + (2 * HALF_ULP[torch.float16] if dequantized else 0)


@pytest.mark.parametrize("rows", (1, 3, 13, 17))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("group", (None, 32))
def test_cpm_linear(rows, bits, dtype, group):
    reason = quantization_cpm.unavailable(CUDA)
    if reason:
        pytest.skip(reason)
    arguments = make(rows, 416, 37, bits, dtype, group)
    y = quantization_cpm.linear(*on_card(arguments))
    assert error(y.cpu(), *arguments) < (FLOAT32_SUM * 4 if rows <= 16 else 2 * HALF_ULP[dtype])


@pytest.mark.parametrize("backend", ("triton", "cpm"))
def test_layer_replays_in_a_cuda_graph(backend):
    family = {"triton": quantization_triton, "cpm": quantization_cpm}[backend]
    if reason := family.unavailable(CUDA):
        pytest.skip(reason)
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 256, device=CUDA, dtype=torch.float16)
    layer = QuantizedLinear.from_linear(linear, 4, backend=backend)
    x = torch.randn(1, 512, device=CUDA, dtype=torch.float16)
    with torch.inference_mode():
        for _ in range(3):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("length, seen", ((1, 700), (5, 700), (128, 0), (1, 0)))
def test_sdpa_matches_eager_on_a_gpu(dtype, length, seen):
    torch.manual_seed(0)
    module = torch.nn.Module()
    total = length + seen
    query = torch.randn(2, 32, length, 128, device=CUDA)
    key, value = (torch.randn(2, 2, total, 128, device=CUDA) for _ in range(2))
    mask = torch.ones(length, total, dtype=torch.bool, device=CUDA).tril(seen)[None, None]
    wanted, _ = eager_attention(module, query, key, value, mask, 128**-0.5)
    reference, _ = eager_attention(module, query.to(dtype), key.to(dtype), value.to(dtype), mask, 128**-0.5)
    given = None if length == 1 or not seen else mask
    got, _ = sdpa_attention(module, query.to(dtype), key.to(dtype), value.to(dtype), given, 128**-0.5)
    assert (got - wanted).norm() <= 2 * (reference - wanted).norm()


@pytest.mark.parametrize("name", MASKED)
def test_attention_under_a_mask(name):
    *tensors, mask = on_card(make_masked(name))
    if not attention_triton.runs(*tensors):
        pytest.skip("the kernels need tensor cores")
    scaling = tensors[0].shape[-1] ** -0.5
    output = attention_triton.masked_attention(*tensors, mask, scaling)
    assert torch.equal(output, attention_triton.masked_attention(*tensors, mask, scaling))
    error, eager = errors(name, output)
    assert error <= 1.2 * eager


def test_attention_under_a_mask_replays_in_a_cuda_graph():
    """As a compiled step with a static cache: the graph reads the mask of each replay."""
    query, key, value, mask = on_card(make_masked("one token; static cache; float16"))
    mask = mask.expand(2, 1, 1, -1).clone()
    with torch.inference_mode():
        for _ in range(3):
            attention_triton.masked_attention(query, key, value, mask, 128**-0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = attention_triton.masked_attention(query, key, value, mask, 128**-0.5)
        mask[..., :150] = True
        graph.replay()
        want = attention_triton.masked_attention(query, key, value, mask, 128**-0.5)
    assert torch.equal(output, want)
    reference, _ = eager_attention(torch.nn.Module(), query, key, value, mask, 128**-0.5)
    assert (output - reference).norm() < 2e-3 * reference.norm()
