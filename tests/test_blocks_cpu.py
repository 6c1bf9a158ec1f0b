"""blocks_cpu: all blocks in one call of C give what the modules give, bit for bit; and which blocks are left to them.

With address and undefined-behavior sanitizers over the C code: see CONTRIBUTING.md.
"""

import copy
import functools

import pytest
import torch
from chatglm2 import blocks_cpu, inference_cpu, modeling_chatglm, quantization_cpu
from chatglm2.transformers_compat import DynamicCache
from conftest import ANSWERS, c_kernels
from model_helpers import some_ids

REASON = inference_cpu.load_library()[1] or quantization_cpu.load_library()[1]
pytestmark = [
    pytest.mark.skipif(bool(REASON), reason=f"no compiled kernel: {REASON}"),
    pytest.mark.needs_transformers("4.57", "caches of layers"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPE = {"hidden_size": 136, "ffn_hidden_size": 200}  # no multiples of a vector or of a group of inputs
SHAPES = {"a token": (1, 1), "drafts": (1, 3), "rows": (3, 1), "chunks": (2, 4)}  # rows, new tokens


@functools.lru_cache(None)
def avx2():
    return [c_kernels("avx2", module=module) for module in (inference_cpu, quantization_cpu)]


@pytest.fixture(params=["avx512 or avx2", "avx2"])
def instructions(request, monkeypatch):
    if request.param == "avx2":
        floats, quantized = avx2()
        monkeypatch.setattr(inference_cpu, "load_library", lambda: floats)
        monkeypatch.setattr(blocks_cpu, "load_floats", lambda: floats)
        monkeypatch.setattr(quantization_cpu, "load_library", lambda: quantized)
        monkeypatch.setattr(blocks_cpu, "load_quantized", lambda: quantized)
    blocks_cpu.quantized_products.cache_clear()
    yield
    blocks_cpu.quantized_products.cache_clear()


@pytest.fixture
def served(monkeypatch):
    """Whether C computed the blocks, for each forward pass from here on."""
    record, compute = [], modeling_chatglm.blocks_in_c

    def recorded(*args):
        y = compute(*args)
        record.append(y is not None)
        return y

    monkeypatch.setattr(modeling_chatglm, "blocks_in_c", recorded)
    return record


@torch.no_grad()
def steps(model, rows=1, tokens=1, count=3):
    """Logits of a padded prompt and of `count` steps of new tokens, and the cache's keys and values at the end."""
    ids, cache = some_ids(rows, 12 + tokens * count), DynamicCache()
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    results = []
    for seen in (0, *range(12, ids.shape[1], tokens)):
        end = seen + tokens if seen else 12
        padding = {"attention_mask": mask[:, :end]} if rows > 1 else {}
        results.append(model(ids[:, seen:end], past_key_values=cache, **padding).logits)
    return results + [held for layer in cache.layers for held in (layer.keys, layer.values)]


def assert_equal_to_modules(model, served, monkeypatch, *shape):
    """The steps by C, and the same by the modules."""
    served.clear()
    got = steps(model, *shape)
    assert served == [False, True, True, True]  # the cache's buffers are made by the prompt
    monkeypatch.setattr(modeling_chatglm, "blocks_in_c", lambda *args: None)
    assert all(map(torch.equal, got, steps(model, *shape)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_equal_to_the_modules(make_model, served, monkeypatch, instructions, bits, dtype, shape):
    """Logits, keys and values, in every dtype; with padding where there are several rows."""
    if bits == 0 and dtype == torch.bfloat16:
        monkeypatch.setattr(blocks_cpu, "most_rows", lambda dtype: 8)  # with more than four torch multiplies
        monkeypatch.setattr(inference_cpu, "most_rows", lambda dtype: 8)
    model = make_model(**SHAPE).to(dtype).quantize(bits)
    assert_equal_to_modules(model, served, monkeypatch, *SHAPES[shape])


@pytest.mark.parametrize(
    "change",
    [
        {"add_bias_linear": True},
        {"multi_query_group_num": 4},
        {"kv_channels": 32, "num_attention_heads": 2, "multi_query_group_num": 1},
        {"post_layer_norm": False},
        {"rope_ratio": 4.0, "rope_ratio_type": "base"},
    ],
    ids=str,
)
def test_equal_for_other_configurations(make_model, served, monkeypatch, change):
    assert_equal_to_modules(make_model(**change).half().quantize(4), served, monkeypatch, 2, 2)


def test_equal_with_groups_and_float_layers_between(make_model, served, monkeypatch):
    """A scale for 32 inputs, layers that are not quantized, and int8 tables beside the blocks."""
    options = {"group_size": 32, "skip": ["layers.1", "dense"], "embedding": True, "output_layer": True}
    assert_equal_to_modules(make_model().half().quantize(4, **options), served, monkeypatch)


def test_a_bfloat16_model_with_float32_norms(make_model, served, monkeypatch):
    model = make_model().bfloat16().quantize(8)
    for block in model.transformer.encoder.layers:
        block.input_layernorm.float(), block.post_attention_layernorm.float()
    assert_equal_to_modules(model, served, monkeypatch)


def test_results_do_not_depend_on_threads(make_model):
    model, before, results = make_model(**SHAPE).half().quantize(4), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(steps(model, 2, 3))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_greedy_answers(tiny_model, tokenizer, served):
    for query, answer in ANSWERS.items():
        assert tiny_model.chat(tokenizer, query, do_sample=False)[0] == answer
    assert sum(served) > 20


def test_the_cache_grows_and_shrinks(make_model, served, monkeypatch):
    """Beyond the room of its buffers, and after a crop: the next step finds its slots."""
    model, ids = make_model(), some_ids(1, 300)

    def run():
        cache, results = DynamicCache(), []
        with torch.no_grad():
            model(ids[:, :250], past_key_values=cache)
            for i in range(250, 262):
                results.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
                if i == 257:
                    cache.crop(-4)
        return results

    got = run()
    assert sum(served) == 12
    monkeypatch.setattr(modeling_chatglm, "blocks_in_c", lambda *args: None)
    assert all(map(torch.equal, got, run()))


def test_float32_overflow_is_left_to_python(make_model, served, monkeypatch):
    """|q| * |x| of int8 may exceed float32 though the product does not: the modules multiply again, scaled."""
    computed, compute = [], blocks_cpu.BlocksInC.compute
    monkeypatch.setattr(blocks_cpu.BlocksInC, "compute", lambda *args: computed.append(compute(*args)) or computed[-1])
    model = make_model(num_layers=1).quantize(8)
    layer, ids = model.transformer.encoder.layers[0].mlp.dense_4h_to_h, some_ids(1, 13)
    with torch.no_grad():
        layer.weight_scale.mul_(1e-37)
        model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight_scale.mul_(1e18)
        cache = DynamicCache()
        model(ids[:, :12], past_key_values=cache)
        output = model(ids[:, 12:], past_key_values=cache)
        want = model(ids).logits[:, -1:]
    assert cache.get_seq_length() == 13 and output.logits.isfinite().all()
    assert len(computed) == 1 and not computed[0].isfinite().all() and not any(served)
    torch.testing.assert_close(output.logits, want, atol=1e-4, rtol=1e-3)


# What is left to Python


def replace_attention(model):
    class Other(modeling_chatglm.SelfAttention):
        pass

    model.transformer.encoder.layers[1].self_attention.__class__ = Other


def patch_instance(model):
    mlp = model.transformer.encoder.layers[2].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x)


def wrap_linear(model):
    attention = model.transformer.encoder.layers[0].self_attention
    attention.dense = torch.nn.Sequential(attention.dense)


def mix_dtypes(model):
    model.transformer.encoder.layers[1].input_layernorm.half()


def train_a_block(model):
    model.transformer.encoder.layers[1].dropout.p = 0.0
    model.transformer.encoder.layers[1].train()


OTHERS = {
    "a hook": lambda model: model.transformer.encoder.layers[1].mlp.register_forward_hook(lambda *args: None),
    "a hook before": lambda model: model.transformer.encoder.layers[0].register_forward_pre_hook(lambda *args: None),
    "a subclass": replace_attention,
    "a forward of its own": patch_instance,
    "a wrapped layer": wrap_linear,
    "norms of two dtypes": mix_dtypes,
    "a block in training": train_a_block,
    "eager attention": lambda model: setattr(model.config, "_attn_implementation", "eager"),
}


@pytest.mark.parametrize("change", OTHERS)
def test_left_to_python(make_model, served, change):
    """What C would pass over: the modules compute, and their results stay close."""
    model = make_model()
    want = steps(model)
    served.clear()
    OTHERS[change](model)
    got = steps(model)
    assert not any(served)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


def test_a_method_replaced_in_its_class(make_model, served, monkeypatch):
    """As patches of other people do, with functools.wraps, too."""
    original, calls = modeling_chatglm.SelfAttention.forward, []

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    model = make_model()
    monkeypatch.setattr(modeling_chatglm.SelfAttention, "forward", forward)
    steps(model)
    assert not any(served) and len(calls) == 4 * 3


@pytest.mark.parametrize("flag", ["rmsnorm", "multi_query_attention", "apply_residual_connection_post_layernorm",
                                  "fp32_residual_connection"])  # fmt: skip
def test_other_networks(make_model, served, make_config, flag):
    steps(make_model(**{flag: not getattr(make_config(), flag)}))
    assert not any(served)


def test_calls_that_ask_for_more(make_model, served):
    """Gradients, hidden states, attention weights, autocast, a global hook, a wide batch."""
    model, ids = make_model(), some_ids(1, 13)

    def call(count=1, **kwargs):
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :12].expand(count, -1), past_key_values=cache)
        return model(ids[:, 12:].expand(count, -1), past_key_values=cache, **kwargs)

    call()
    with torch.no_grad():
        call(output_hidden_states=True)
        call(output_attentions=True)
        call(blocks_cpu.MOST_TOKENS + 1)
        with torch.autocast("cpu", torch.bfloat16):
            call()
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
        try:
            call()
        finally:
            handle.remove()
        assert not any(served)
        call(blocks_cpu.MOST_TOKENS)
        assert served[-1]


def test_weights_in_the_released_packing(make_model, served):
    """A copy of a layer has them until its first use: nothing is read in the wrong order."""
    model = make_model().half().quantize(4)
    want = steps(model)
    other = copy.deepcopy(model)
    served.clear()
    assert all(map(torch.equal, steps(other), want)) and served == [False, True, True, True]
    mlp = other.transformer.encoder.layers[1].mlp
    with torch.no_grad():
        cache, ids = DynamicCache(), some_ids(1, 15)
        other(ids[:, :12], past_key_values=cache)
        mlp.dense_4h_to_h.float().half()  # in the layout still
        mlp.dense_h_to_4h = copy.deepcopy(mlp.dense_h_to_4h)
        got = [other(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 15)]
    assert served[-4:] == [False, False, True, True] and all(map(torch.equal, got, want[1:4]))
