"""The GPU kernels and attention on a GPU; test_quantization_triton.py and others like it need none."""

import copy
import gc
import threading

import pytest
import torch
from chatglm2 import attention_triton, blocks_cuda, inference_triton, quantization_cpm, quantization_triton
from chatglm2.attention_chatglm import eager_attention, sdpa_attention
from chatglm2.quantization import QuantizedLinear
from chatglm2.transformers_compat import DynamicCache
from model_helpers import some_ids
from quantization_helpers import CUDA, FLOAT32_SUM, HALF_ULP, error, make
from test_attention_triton import CASES as MASKED
from test_attention_triton import errors
from test_attention_triton import make as make_masked
from test_inference_triton import CASES as SMALL
from test_inference_triton import bound, tensors
from test_inference_triton import error as small_error
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


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("kind, name", SMALL)
def test_norm_rotation_and_gate(kind, name, dtype):
    """Of the rotation the very bits of torch's own."""
    arguments = on_card(tensors(kind, name, dtype))
    got = getattr(inference_triton, "triton_" + kind)(*arguments)
    assert small_error(kind, name, dtype, got) <= bound(kind, str(dtype)[6:])


# Decode steps in CUDA graphs; test_blocks_cuda.py tells more of them without a GPU


def decode(model, count=8, prompt=12, rows=1, tokens=1, cache=None):
    """Logits of `count` steps after a prompt, which is padded where there are several rows."""
    ids, cache, results = (
        some_ids(rows, prompt + tokens * count).to(CUDA),
        DynamicCache() if cache is None else cache,
        [],
    )
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    with torch.inference_mode():
        for seen in (0, *range(prompt, ids.shape[1], tokens)):
            end = seen + tokens if seen else prompt
            padding = {"attention_mask": mask[:, :end]} if rows > 1 else {}
            results.append(model(ids[:, seen:end], past_key_values=cache, **padding).logits[:, -1].float())
    return torch.stack(results[1:])


@pytest.fixture
def on_a_card(make_model):
    """A factory of models on the GPU; graphs are captured from the second step on, whoever ran before."""

    def make(bits=0, dtype=torch.float16, **changes):
        model = make_model(num_layers=4, **changes).to(dtype)
        return model.to(CUDA).quantize(bits) if bits else model.to(CUDA)

    blocks_cuda.CARDS.clear()
    return make


def replays():
    """How often a graph is replayed from here on, counted in its only item."""
    count, replay = [0], torch.cuda.CUDAGraph.replay

    def counted(graph):
        count[0] += 1
        replay(graph)

    return count, counted


KINDS = ((0, torch.float16), (0, torch.bfloat16), (4, torch.float16), (8, torch.bfloat16), (4, torch.float32))


@pytest.mark.parametrize("bits, dtype", KINDS)
@pytest.mark.parametrize("rows, tokens", ((1, 1), (1, 5), (3, 1), (2, 4)))
def test_decoding_by_graphs(on_a_card, monkeypatch, bits, dtype, rows, tokens):
    """As exact as the modules, of which attention rounds in another order; and deterministic."""
    model = on_a_card(bits, dtype)
    count, counted = replays()
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    got, again = (decode(model, rows=rows, tokens=tokens) for _ in range(2))
    assert blocks_cuda.card_of(got.device).works and count[0] >= 12 and torch.equal(got, again)
    model.config.cuda_graphs = False
    by_modules = decode(model, rows=rows, tokens=tokens)
    assert count[0] < 16
    want = decode(model.float(), rows=rows, tokens=tokens)
    rounding = (by_modules - want).norm()
    assert (got - want).norm() <= 1.5 * rounding + 1e-5 * want.norm()


def test_a_graph_for_each_buffer(on_a_card):
    """The cache outgrows its buffers, twice; and is cropped."""
    model = on_a_card(4)
    cache = DynamicCache()
    got = decode(model, 300, 250, cache=cache)
    model.config.cuda_graphs = False
    want = decode(model, 300, 250)
    assert (got - want).norm() < 0.02 * want.norm()
    model.config.cuda_graphs = True
    with torch.inference_mode():
        cache.crop(-100)
        after = [model(some_ids(1, 1, i).to(CUDA), past_key_values=cache).logits.float() for i in range(5)]
        model.config.cuda_graphs = False
        cache.crop(-5)
        other = [model(some_ids(1, 1, i).to(CUDA), past_key_values=cache).logits.float() for i in range(5)]
    assert (torch.stack(after) - torch.stack(other)).norm() < 0.02 * torch.stack(other).norm()


def test_weights_that_change(on_a_card):
    """In place and as new tensors, between the steps of a conversation."""
    model, results, ids = on_a_card(0), {}, some_ids(1, 4).to(CUDA)
    weight = model.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight
    released = weight.detach().clone()
    changes = (lambda: weight.data.mul_(2), lambda: setattr(weight, "data", weight.data / 4))
    for graphs in (True, False):
        model.config.cuda_graphs, cache, weight.data = graphs, DynamicCache(), released.clone()
        parts = list(decode(model, 4, cache=cache))
        for change in changes:
            change()
            with torch.inference_mode():
                for i in range(4):
                    parts.append(model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1].float())
        results[graphs] = torch.stack(parts)
    assert (results[True] - results[False]).norm() < 0.02 * results[False].norm()


@pytest.mark.parametrize("streams", ("one stream", "a stream each"))
def test_threads(on_a_card, streams):
    """Conversations side by side, whose graphs are replayed in turns; then answers that sample, without new graphs."""
    model, caches, results, errors = on_a_card(4), [DynamicCache() for _ in range(4)], {}, []
    for i, cache in enumerate(caches):
        decode(model, 20, 10 + i, cache=cache)
    copies = copy.deepcopy(caches)

    def go_on(cache):
        with torch.inference_mode():
            steps = [model(some_ids(1, 1, i).to(CUDA), past_key_values=cache).logits.float() for i in range(40)]
        return torch.stack(steps)

    model.config.cuda_graphs = False
    wanted = list(map(go_on, copies))
    model.config.cuda_graphs = True
    torch.cuda.synchronize()

    def work(i):
        try:
            stream = torch.cuda.Stream() if streams == "a stream each" else torch.cuda.current_stream()
            with torch.cuda.stream(stream):
                results[i] = go_on(caches[i])
                stream.synchronize()
                model.generate(some_ids(1, 5).to(CUDA), do_sample=True, max_new_tokens=30, min_new_tokens=30)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and blocks_cuda.card_of(results[0].device).works
    for i, want in enumerate(wanted):
        assert (results[i] - want).norm() < 0.02 * want.norm()


def test_graphs_leave_no_memory(on_a_card):
    """What a conversation held is free after it, and the next takes no more of the card."""
    model = on_a_card(4)

    def held():
        decode(model, 20)
        gc.collect()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    held()
    allocated, reserved = held()
    for _ in range(10):
        again = held()
        assert again[0] == allocated and again[1] <= reserved


def test_generate_by_graphs(on_a_card):
    """Greedy, sampling, beams, drafts, batches: all answer."""
    model, ids = on_a_card(4), some_ids(1, 20).to(CUDA)
    new = {"max_new_tokens": 20, "min_new_tokens": 20}
    for options in ({}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(ids, **{"do_sample": False, **options}, **new).shape[1] == 40
    assert model.generate(some_ids(3, 20).to(CUDA), do_sample=False, **new).shape == (3, 40)
    assert blocks_cuda.card_of(ids.device).works


def test_in_and_out_of_inference_mode(on_a_card):
    """A graph that was captured in inference mode is replayed outside it, and others are captured there."""
    model, cache = on_a_card(4), DynamicCache()
    decode(model, cache=cache)
    with torch.no_grad():
        for i in range(4):
            model(some_ids(1, 1, i).to(CUDA), past_key_values=cache)
            model(some_ids(1, 2, i).to(CUDA), past_key_values=cache)
    decode(model, tokens=3)
    assert blocks_cuda.card_of(CUDA).works


def test_random_numbers_are_the_callers(on_a_card):
    """Neither a capture nor a replay draws any."""
    model = on_a_card(4)
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    decode(model)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    drawn = torch.rand(3, device=CUDA)
    torch.cuda.manual_seed(7)
    assert torch.equal(torch.rand(3, device=CUDA), drawn)


def test_in_a_graph_of_the_caller(on_a_card):
    """Where somebody else captures, the modules compute."""
    model, cache, other = on_a_card(4), DynamicCache(), DynamicCache()
    decode(model, cache=cache), decode(model, cache=other)
    ids, graph = some_ids(1, 1).to(CUDA), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.graph(graph):
            got = model(ids, past_key_values=cache).logits
        graph.replay()
        want = model(ids, past_key_values=other).logits
    assert (got - want).norm() < 0.02 * want.norm()


def test_a_capture_that_fails(on_a_card, monkeypatch):
    """A warning; then the modules compute, random numbers are drawn, and torch frees memory, as ever."""
    compute = blocks_cuda.Step.compute

    def waits(*args):
        y = compute(*args)
        y.sum().item()
        return y

    model = on_a_card(4)
    model.config.cuda_graphs = False
    want = decode(model)
    model.config.cuda_graphs = True
    monkeypatch.setattr(blocks_cuda.Step, "compute", waits)
    with pytest.warns(UserWarning, match="cannot be captured"):
        got = decode(model)
    assert not blocks_cuda.card_of(CUDA).works and (got - want).norm() < 0.02 * want.norm()
    torch.multinomial(torch.ones(8, device=CUDA), 1)
    torch.cuda.empty_cache()
    model.generate(some_ids(1, 5).to(CUDA), do_sample=True, max_new_tokens=8, min_new_tokens=8)
    torch.cuda.synchronize()
