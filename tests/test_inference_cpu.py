"""inference_cpu: the C code against plain torch, within that one's own error, and when the model uses it.

With address and undefined-behavior sanitizers over the C code: see CONTRIBUTING.md.
"""

import ctypes
import functools
import inspect
import mmap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from chatglm2 import attention_chatglm, c_library, inference_cpu
from chatglm2.attention_chatglm import choose_attention, eager_attention
from chatglm2.modeling_chatglm import rotate
from chatglm2.torch_compat import rms_norm
from conftest import ANSWERS, c_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import CLOSE, GREEDY, logits, some_ids

REASON = inference_cpu.load_library()[1]
needs_compiled = pytest.mark.skipif(bool(REASON), reason=f"no compiled kernel: {REASON}")
pytestmark = [needs_compiled, pytest.mark.usefixtures("without_gradients")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@functools.lru_cache(None)
def library(kind):
    return c_kernels(kind, *(c_library.AVX512.values() if kind == "avx512" else ()), module=inference_cpu)


@pytest.fixture(params=["this CPU's", "avx512", "avx2"])
def instructions(request, monkeypatch):
    """Those of this CPU, and of others: avx512 has no product of bfloat16."""
    if request.param == "avx512" and "avx512_bf16" not in c_library.cpu_flags():
        pytest.skip("this CPU's instructions are no more than these, or less")
    if request.param != "this CPU's":
        loaded = library(request.param)
        monkeypatch.setattr(inference_cpu, "load_library", lambda: loaded)


class Module:
    training = False


def tensors(B, H, G, T, S, D, dtype, cache_dtype=None, seed=0):
    """query, key, value as the model passes them: the query a transposed view, the cache with room for more tokens."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, T, H, D, generator=generator).to(dtype).transpose(1, 2)
    cache = torch.randn(2, B, G, S + 3, D, generator=generator).to(cache_dtype or dtype)
    return query, cache[0, :, :, :S], cache[1, :, :, :S]


def before_a_guard_page(tensor):
    """A dense copy that ends where reading is forbidden: one byte beyond it ends the process."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    whole = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    return whole.view(tensor.shape).copy_(tensor)


def padding(B, T, S, seed=0):
    """A mask (B, 1, T, S): T new tokens behind S - T cached ones, with padding on the left of some rows."""
    place, query = torch.arange(S), torch.arange(S - T, S)[:, None]
    lengths = torch.randint(0, S, (B, 1, 1, 1), generator=torch.Generator().manual_seed(seed))
    lengths[0] = 0
    return (place <= query) & (place >= lengths) | (place == query)


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def assert_as_exact_as_eager(query, key, value, mask=None):
    """At most half again as wrong, against float64, as eager attention is in the query's dtype."""
    scaling = query.shape[-1] ** -0.5
    y, weights = inference_cpu.attention(Module, query, key, value, mask, scaling)
    assert weights is None and y.dtype == query.dtype and y.is_contiguous()
    exact, _ = eager_attention(Module, query.double(), key.double(), value.double(), mask, scaling)
    same = [t.to(query.dtype) for t in (key, value)]
    own = relative_error(eager_attention(Module, query, *same, mask, scaling)[0], exact)
    assert relative_error(y, exact) <= 1.5 * own + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, S", [(1, 1), (1, 63), (1, 5000), (4, 600), (9, 9), (70, 70), (40, 200)])
def test_matches_eager_in_the_shapes_of_6b(instructions, dtype, T, S):
    """A step, drafts, a prompt, and a chunk of one."""
    mask = padding(1, T, S) if 1 < T < S else None
    assert_as_exact_as_eager(*tensors(1, 32, 2, T, S, 128, dtype), mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_32768_tokens(instructions, dtype):
    """No nan, no loss of small weights: the error stays that of a short context."""
    assert_as_exact_as_eager(*tensors(1, 4, 1, 1, 32768, 64, dtype))
    query, key, value = tensors(1, 4, 1, 1, 32768, 64, dtype)
    y, _ = inference_cpu.attention(Module, query * 100, key, torch.ones_like(value), None, 0.125)
    torch.testing.assert_close(y, torch.ones_like(y))


@given(
    B=st.integers(1, 3),
    G=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 16, 20]),
    T=st.integers(1, 40),
    cached=st.integers(0, 200),
    D=st.sampled_from([8, 16, 24, 64, 128, 136, 256]),
    dtype=st.sampled_from(DTYPES),
    cache_dtype=st.sampled_from([None, None, *DTYPES]),
    masked=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def check_any_shape(B, G, group, T, cached, D, dtype, cache_dtype, masked, seed):
    cached = 0 if not masked and T > 1 else cached
    inputs = [*tensors(B, G * group, G, T, cached + T, D, dtype, cache_dtype, seed)]
    inputs += [padding(B, T, cached + T, seed)] if masked else []
    assert_as_exact_as_eager(*map(before_a_guard_page, inputs))


def test_matches_eager_in_any_shape(instructions):
    """Any group, head size and dtype, causal or with padding; and nothing is read beyond the inputs."""
    check_any_shape()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_masks(instructions, dtype):
    """A cache in another order, a mask for all rows of a batch, a static cache's unused slots, no causal mask."""
    query, key, value = tensors(2, 4, 2, 5, 5, 16, dtype)
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value)]
    assert_as_exact_as_eager(query, *swapped)
    assert_as_exact_as_eager(query, key, value, padding(1, 5, 5))
    unused = [torch.cat((t, torch.full_like(t, float("nan"))), dim=2) for t in (key, value)]
    assert_as_exact_as_eager(query, *unused)
    channels_first = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (query, key, value)]
    want, _ = inference_cpu.attention(Module, query, key, value, None, 0.25, is_causal=False)
    all_keys = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    assert torch.equal(inference_cpu.attention(Module, *channels_first, all_keys, 0.25)[0], want)


def test_no_key_at_all_gives_zeros(instructions):
    query, key, value = tensors(1, 4, 2, 2, 9, 16, torch.float16)
    mask = torch.ones(1, 1, 2, 9, dtype=torch.bool)
    mask[0, 0, 1] = False
    y, _ = inference_cpu.attention(Module, query, key, value, mask, 0.25)
    assert not y[0, 1].any() and y[0, 0].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(instructions, bad, dtype):
    """From the key that a head attends to, to that head's output; and from nowhere else."""
    query, key, value = tensors(1, 4, 2, 3, 700, 16, dtype)
    mask = padding(1, 3, 700)
    key[0, 1, 698] = bad  # the second group's; the first token does not attend to it
    y, _ = inference_cpu.attention(Module, query, key, value, mask, 0.25)
    assert y[0, 0].isfinite().all() and y[0, :, :2].isfinite().all() and y[0, 1:, 2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_do_not_depend_on_threads_or_on_other_tokens(instructions, dtype):
    query, key, value = tensors(1, 32, 2, 6, 3000, 128, dtype)
    mask, before, results = padding(1, 6, 3000), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(inference_cpu.attention(Module, query, key, value, mask, 0.1)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone, _ = inference_cpu.attention(Module, query[:, :, 4:5], key, value, mask[:, :, 4:5], 0.1)
    assert torch.equal(alone, results[0][:, 4:5])


# Linear layers of floats


def linear_inputs(n, k, out, dtype, seed=0):
    """x, weight, bias, each in front of a guard page; many begin at an odd multiple of their size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, k), (out, k), (out,)
    return [before_a_guard_page(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def assert_linear_as_exact_as_torch(x, weight, bias):
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    y, own = inference_cpu.c_linear(x, weight, bias), relative_error(F.linear(x, weight, bias), exact)
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert relative_error(y, exact) <= 1.5 * own + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 9, 16])
def test_linear_in_the_shapes_of_6b(instructions, dtype, n):
    assert_linear_as_exact_as_torch(*linear_inputs(n, 4096, 50, dtype)[:2], None)
    assert_linear_as_exact_as_torch(*linear_inputs(n, 13696, 12, dtype))


@given(
    n=st.one_of(st.integers(1, 20), st.integers(120, 140)),
    k=st.integers(1, 300),
    out=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def check_any_linear(n, k, out, dtype, seed):
    x, weight, bias = linear_inputs(n, k, out, dtype, seed)
    assert_linear_as_exact_as_torch(x, weight, bias)
    together = inference_cpu.c_linear(x, weight, bias)
    for i in {0, n // 2, n - 1}:
        assert torch.equal(inference_cpu.c_linear(x[i : i + 1], weight, bias)[0], together[i])


def test_linear_in_any_shape(instructions):
    """Nothing is read beyond the inputs, and a row does not depend on the others."""
    check_any_linear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_does_not_depend_on_threads(instructions, dtype):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(inference_cpu.c_linear(*linear_inputs(5, 500, 333, dtype)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_linear_passes_nan_and_inf_on(instructions, dtype, bad):
    x, weight, bias = linear_inputs(3, 70, 20, dtype)
    x[1, 69] = bad
    y = inference_cpu.c_linear(x, weight, bias)
    assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()


@pytest.fixture
def linear_calls(monkeypatch):
    """Rows of every call of the C product."""
    calls, library = [], inference_cpu.load_library()[0]

    class Counting:
        def linear(self, *args):
            calls.append(args[5])
            library.linear(*args)

        def __getattr__(self, name):
            return getattr(library, name)

    monkeypatch.setattr(inference_cpu, "load_library", lambda: (Counting(), ""))
    return calls


def test_linear_leaves_the_rest_to_torch(linear_calls, monkeypatch):
    """Weights of another dtype, class, layout or order, autocast, and more rows than C is faster for."""
    x, weight, bias = torch.randn(3, 16), torch.randn(8, 16), torch.randn(8)
    linear = inference_cpu.linear
    monkeypatch.setattr(inference_cpu, "most_rows", lambda dtype: 3)
    turned, subclass = weight.t().contiguous().t(), weight.as_subclass(type("Other", (torch.Tensor,), {}))
    for other in (turned, subclass, weight.to_sparse()):
        torch.testing.assert_close(torch.Tensor(linear(x, other, None)), F.linear(x, weight))
    linear(x, weight, bias[:1])  # torch broadcasts it
    linear(torch.cat((x, x)), weight, bias)
    linear(x.double(), weight.double(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with torch.enable_grad():
        linear(x, weight, bias)
    for wrong in (weight.half(), weight[:, 1:]):
        with pytest.raises(RuntimeError):
            linear(x, wrong, None)
    assert linear_calls == []
    torch.testing.assert_close(linear(x[None], weight, bias), F.linear(x[None], weight, bias))
    assert linear_calls == [3]


def test_rows_that_c_multiplies_faster(monkeypatch):
    """Any number in float16, unless the CPU computes in it, as torch does then; few in bfloat16, unless C pairs it."""
    most_rows = inference_cpu.most_rows.__wrapped__
    monkeypatch.setattr(inference_cpu, "cpu_flags", lambda: {"avx2"})
    assert most_rows(torch.float16) > 10**6
    monkeypatch.setattr(inference_cpu, "cpu_flags", lambda: {"avx2", "avx512_fp16", "avx512_bf16"})
    assert most_rows(torch.float16) == 64
    loaded = library("avx2")  # as by a compiler that does not know this CPU's AVX512-BF16
    monkeypatch.setattr(inference_cpu, "load_library", lambda: loaded)
    assert most_rows(torch.bfloat16) == 4
    loaded = SimpleNamespace(options=("-mavx512bf16",)), ""
    assert most_rows(torch.bfloat16) == 32
    monkeypatch.setattr(inference_cpu, "cpu_flags", lambda: {"avx512_bf16", "amx_bf16"})  # torch computes in AMX
    assert most_rows(torch.bfloat16) == 4


# In the model


def counted(monkeypatch):
    """Calls of the C code from here on."""
    calls = []

    def attention(*args, **kwargs):
        calls.append(1)
        return inference_cpu.attention(*args, **kwargs)

    monkeypatch.setattr(attention_chatglm, "cpu_attention", attention)
    return calls


def test_model_uses_it_for_sdpa(make_model, padded_batch, monkeypatch):
    """A padded prompt, and steps with a growing cache: eager's logits and ids, by the C code."""
    calls, (ids, mask, _) = counted(monkeypatch), padded_batch
    fused, plain = make_model(), make_model(attention="eager")
    want = logits(plain, ids, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(logits(fused, ids, attention_mask=mask)[mask.bool()], want, **CLOSE)
    assert len(calls) == 3
    outputs = [model.generate(ids, attention_mask=mask, **GREEDY) for model in (fused, plain)]
    assert torch.equal(*outputs)
    assert len(calls) == 3 + GREEDY["max_new_tokens"] * 3


@pytest.mark.needs_transformers("4.57", "StaticCache with the arguments of today")
def test_static_cache(make_model, monkeypatch):
    """The unused slots of a static cache are masked."""
    from transformers import StaticCache

    calls, model, ids = counted(monkeypatch), make_model(), some_ids(rows=1)
    cache = StaticCache(config=model.config, max_cache_len=40)
    want = logits(make_model(attention="eager"), ids)
    for part in (slice(0, 7), slice(7, 8), slice(8, 12)):  # a prompt, a token, a few
        torch.testing.assert_close(logits(model, ids[:, part], cache=cache), want[:, part], **CLOSE)
    assert len(calls) == 9


def test_linear_layers_of_the_model(make_model, linear_calls):
    """All of them, for a prompt, a token and a draft: the logits of torch's product."""
    model, ids = make_model(), some_ids(rows=1)
    got = logits(model, ids)
    rows = [layer.in_features for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert linear_calls == [ids.numel()] * len(rows)
    with torch.enable_grad():
        want = model(ids).logits
    torch.testing.assert_close(got, want.detach(), **CLOSE)


def test_greedy_answers(tiny_model, tokenizer, monkeypatch):
    calls = counted(monkeypatch)
    for query, answer in ANSWERS.items():
        assert tiny_model.chat(tokenizer, query, do_sample=False)[0] == answer
    assert len(calls) > 20


def test_torch_computes_what_it_does_not(make_config, monkeypatch):
    config, x, mask = make_config(), torch.zeros(1, 4, 64), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    config._attn_implementation = "sdpa"
    assert choose_attention(config, x, mask) is attention_chatglm.cpu_attention
    sdpa = attention_chatglm.sdpa_attention
    with torch.enable_grad():
        assert choose_attention(config, x, mask) is sdpa
    for other in (x.double(), x.to("meta"), torch.nn.Parameter(x), x[:0]):
        assert choose_attention(config, other, mask) is sdpa
    for other in (mask.float(), mask.expand(1, 4, 4, 4), mask[0]):
        assert choose_attention(config, x, other) is sdpa
    config.attention_dropout = 0.5
    assert choose_attention(config, x, mask, training=True) is sdpa
    assert choose_attention(config, x, mask) is attention_chatglm.cpu_attention
    for size in (20, 264):
        config.kv_channels = size
        assert choose_attention(config, x, mask) is sdpa
    config.kv_channels = 16
    monkeypatch.setattr(inference_cpu, "load_library", lambda: (None, "no compiler"))
    assert choose_attention(config, x, mask) is sdpa


# What stands beside it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, size", [(1, 1, 4096), (2, 3, 64), (3, 1, 37), (1, 5, 8)])
def test_rms_norm_matches_torch(instructions, dtype, B, T, size):
    """Exact but for one rounding, for rows of any length; with a weight of another dtype, too."""
    x, weight = before_a_guard_page(torch.randn(B, T, size).to(dtype)), before_a_guard_page(torch.randn(size))
    for w in (weight, weight.to(dtype)):
        got, exact = inference_cpu.c_rms_norm(x, w.shape, w, 1e-5), rms_norm(x.double(), w.shape, w.double(), 1e-5)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, D", [(1, 1, 128), (2, 5, 16), (3, 1, 64)])
@pytest.mark.parametrize("rows", ["one", "all"])
def test_rotation_matches_torch(instructions, dtype, B, T, D, rows):
    """The query and key of a wider tensor, with the angles of one row or of each."""
    mixed = torch.randn(B, T, 9, D).to(dtype)
    angles = before_a_guard_page(torch.randn(1 if rows == "one" else B, T, 1, D // 4) * 1000)
    plain = inspect.unwrap(rotate)
    want = plain(mixed[:, :, :7], angles.cos(), angles.sin())
    for x in (mixed[:, :, :7], mixed.transpose(0, 1).contiguous().transpose(0, 1)[:, :, :7]):
        got = inference_cpu.c_rotate(x, angles.cos(), angles.sin())
        torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(got[..., D // 2 :], want[..., D // 2 :])
    with torch.no_grad():  # angles of another dtype are left to torch
        wide = angles.double()
        assert torch.equal(rotate(mixed, wide.cos(), wide.sin()), plain(mixed, wide.cos(), wide.sin()))


def test_rotation_of_one_token_with_any_stride(instructions):
    """One token of several rows is contiguous whatever its own stride says, which torch then keeps."""
    x, angles = torch.randn(3, 1, 4, 32), torch.randn(3, 1, 1, 8)
    odd = x.as_strided(x.shape, (x.stride(0), 7, *x.stride()[2:]))
    assert torch.equal(inference_cpu.c_rotate(odd, angles.cos(), angles.sin()),
                       inference_cpu.c_rotate(x, angles.cos(), angles.sin()))  # fmt: skip


@pytest.mark.parametrize("places", [torch.arange(3)[None], torch.arange(9)[None], torch.arange(10).view(2, 5)])
def test_positions_that_do_not_fit_are_rejected(make_model, places):
    """Positions of fewer or more tokens or rows: the error of plain torch, and no reading beyond the table."""
    with pytest.raises(RuntimeError, match="must match"):
        make_model()(some_ids(rows=4)[:, :5], position_ids=places)


def test_embeddings_of_another_size_are_rejected(make_model):
    with pytest.raises(RuntimeError, match="normalized_shape|must match"):
        make_model()(inputs_embeds=torch.zeros(1, 5, 999))


def test_plain_functions_compute_what_it_does_not(make_config, monkeypatch):
    """With gradients, in float64, under torch.func, without a compiler; and the C code otherwise."""
    calls = []
    either = inference_cpu.in_c(lambda x: calls.append(1) or x, lambda x: x.shape[0] == 1)(lambda x: x)
    x = torch.zeros(1, 2)
    for other in (x.double(), x.to("meta"), torch.nn.Parameter(x), x[:, :0], torch.zeros(2, 2)):
        either(other)
    with torch.enable_grad():
        either(x)
    torch.func.vmap(either)(x[None])
    with torch.autograd.forward_ad.dual_level():
        either(torch.autograd.forward_ad.make_dual(x, x))
    assert calls == []
    either(x)
    assert calls == [1]
    monkeypatch.setattr(inference_cpu, "load_library", lambda: (None, "no compiler"))
    either(x)
    assert calls == [1]
