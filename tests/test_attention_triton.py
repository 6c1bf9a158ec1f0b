"""attention_triton without a GPU: in Triton's interpreter, compiled for several capabilities, and as an op of graphs.

The interpreter runs in a subprocess, which is this file as a program. test_cuda_device.py runs the kernels on a card.
"""

import json

import pytest
import torch
from chatglm2 import attention_chatglm, attention_triton
from chatglm2.attention_chatglm import eager_attention
from model_helpers import some_ids
from triton_compile import compile_attention
from triton_helpers import multiply_bfloat16, needs_triton, run_in_the_interpreter

SHAPES = {  # B, H, G, T, S, D
    "one token": (2, 32, 2, 1, 200, 128),
    "one token, one stretch": (1, 4, 4, 1, 70, 32),
    "one token, many stretches": (1, 4, 1, 1, 33 * 128, 16),
    "five tokens": (2, 4, 2, 5, 333, 64),
    "sixteen tokens, heads of 80": (1, 8, 1, 16, 150, 80),
}
MASKS = ("causal", "static cache", "padding", "holes", "one row", "nothing")
CASES = [f"{shape}; {mask}; float16" for shape in ("one token", "five tokens") for mask in MASKS]
CASES += [f"{shape}; {mask}; float16" for shape in list(SHAPES)[1:] for mask in MASKS[:2] if shape != "five tokens"]
CASES += [f"{shape}; causal; bfloat16" for shape in ("one token", "five tokens")]


def make(name):
    """query, key, value, mask, with values that make attention look at few keys."""
    shape, kind, dtype = name.split("; ")
    B, H, G, T, S, D = SHAPES[shape]
    generator = torch.Generator().manual_seed(CASES.index(name))
    query, key, value = (torch.randn(B, heads, n, D, generator=generator) for heads, n in ((H, T), (G, S), (G, S)))
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T).repeat(B, 1, 1, 1)
    if kind == "static cache":  # of which a third is in use
        mask = torch.ones(T, S, dtype=torch.bool).tril(S // 3 - T)[None, None]
    elif kind == "padding":
        mask[0, :, :, : S // 2] = False
    elif kind == "holes":
        mask &= torch.rand(mask.shape, generator=generator) < 0.5
    elif kind == "one row":
        mask = mask[:, :, -1:]
    elif kind == "nothing":
        mask[0, :, 0] = False
    return *(t.to(getattr(torch, dtype)) for t in (2 * query, key, value)), mask


def errors(name, output):
    """(the error of output (B, T, H, D), eager's in the same dtype), relative to eager in float64."""
    query, key, value, mask = make(name)
    attends = mask.any(-1)[:, 0, :, None, None]
    wide = [t.double() for t in (query, key, value)]
    want, same = (
        eager_attention(torch.nn.Module(), *tensors, mask, query.shape[-1] ** -0.5)[0].double().where(attends, 0.0)
        for tensors in (wide, (query, key, value))
    )
    assert output.dtype == query.dtype and output.isfinite().all()
    return [float((got - want).norm() / want.norm().clamp(min=1e-9)) for got in (output.cpu().double(), same)]


def interpret():
    """Return {case: `errors`}. Runs with TRITON_INTERPRET=1."""
    multiply_bfloat16()
    results = {}
    for name in CASES:
        *tensors, mask = make(name)
        output = attention_triton.masked_attention(*tensors, mask, tensors[0].shape[-1] ** -0.5, processors=20)
        results[name] = errors(name, output)
    return results


@pytest.fixture(scope="module")
def interpreted():
    return run_in_the_interpreter(__file__)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_values_in_the_interpreter(interpreted, name):
    """As exact as eager in the same dtype; the interpreter truncates bfloat16 where a card rounds."""
    error, eager = interpreted[name]
    assert error <= (2 if "bfloat16" in name else 1) * eager


@needs_triton
@pytest.mark.parametrize("capability", (80, 86, 90, 120))
@pytest.mark.parametrize("tokens", (1, 5))
def test_kernels_compile_for_each_capability(capability, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    stretch, combine = compile_attention(capability, tokens, torch.float16)
    for built in (stretch, combine):
        assert built.asm["cubin"][:4] == b"\x7fELF"
        assert built.metadata.shared <= 99 << 10  # the limit per block of consumer cards
    assert "mma" in stretch.asm["ptx"]
    assert stretch.asm["ptx"].count("cp.async.cg.shared.global") >= 4  # keys and values, ahead of the product


@pytest.mark.parametrize("name", [name for name in CASES if "nothing" not in name])
def test_torch_where_the_kernels_do_not_run(name):
    *tensors, mask = make(name)
    output = attention_chatglm.masked_attention(*tensors, mask, tensors[0].shape[-1] ** -0.5)
    error, eager = errors(name, output)
    assert output.is_contiguous() and error <= eager


def test_which_forward_passes_it_computes():
    """A few tokens under a boolean mask, on a GPU, without gradients."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(*shape, dtype=torch.float16, device="cuda:0"):
        return torch.empty(shape, dtype=dtype, device=device)

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_triton, "needs_dispatch", lambda x: False)  # these tensors are fakes
        computes, x = attention_triton.computes_attention, fake(2, 16, 64)
        mask = fake(2, 1, 16, 40, dtype=torch.bool)
        with torch.no_grad():
            assert computes(x, mask)
            assert not computes(x, None)
            assert not computes(x, fake(2, 1, 16, 40))
            assert not computes(x, fake(2, 16, 40, dtype=torch.bool))
            assert not computes(x, fake(2, 32, 16, 40, dtype=torch.bool))
            assert not computes(fake(2, 17, 64), mask)
            assert not computes(fake(2, 16, 64, device="cpu"), mask)
        assert not computes(x, mask)


def test_the_op_can_be_defined_by_torch_2_4():
    """Its `custom_op` reads types, and no names of types."""
    assert all(isinstance(kind, type) for kind in attention_chatglm.masked_attention.__annotations__.values())


@pytest.mark.skipif(not hasattr(torch.library, "custom_op"), reason="torch.library.custom_op came with torch 2.4")
@pytest.mark.needs_transformers("4.57", "StaticCache with the arguments of today")
def test_a_compiled_step_calls_the_op(make_model, monkeypatch):
    """One graph, with the op in it for every layer, and the logits of an uncompiled step."""
    from transformers import StaticCache

    graphs, model, ids = [], make_model(), some_ids()
    name = "triton_computes_attention"
    monkeypatch.setattr(attention_chatglm, name, lambda x, mask: mask is not None and x.shape[1] <= 16)
    monkeypatch.setattr(attention_chatglm, "computes_attention", lambda *args: False)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def steps(forward):
        cache = StaticCache(config=model.config, max_cache_len=40)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            return [forward(ids[:, i : i + 1], past_key_values=cache).logits for i in range(2)]

    want = steps(model)
    got = steps(torch.compile(model, backend=keep, fullgraph=True))
    for one, other in zip(want, got):
        torch.testing.assert_close(one, other)
    names = [str(node.target) for node in graphs[-1].graph.nodes]
    assert names.count("chatglm.masked_attention") == model.config.num_layers, names


if __name__ == "__main__":
    print(json.dumps(interpret()))
