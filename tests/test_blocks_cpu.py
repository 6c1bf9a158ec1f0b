"""blocks_cpu: all blocks in one call of C give what the modules give, bit for bit; and which blocks are left to them.

With address and undefined-behavior sanitizers over the C code: see CONTRIBUTING.md.
"""

import contextlib
import copy
import functools
import types

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
    record, compute = [], modeling_chatglm.blocks_at_once["cpu"]

    def recorded(*args):
        y = compute(*args)
        record.append(y is not None)
        return y

    monkeypatch.setitem(modeling_chatglm.blocks_at_once, "cpu", recorded)
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


@contextlib.contextmanager
def by_modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(modeling_chatglm.blocks_at_once, "cpu")
        yield


def by_c_and_by_modules(run):
    """What `run` returns, twice."""
    by_c = run()
    with by_modules():
        return by_c, run()


def assert_equal_to_modules(model, served, *shape):
    """The steps by C, and the same by the modules."""
    served.clear()
    pair = by_c_and_by_modules(lambda: steps(model, *shape))
    assert served == [False, True, True, True]  # the cache's buffers are made by the prompt
    assert all(map(torch.equal, *pair))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_equal_to_the_modules(make_model, served, monkeypatch, instructions, bits, dtype, shape):
    """Logits, keys and values, in every dtype; with padding where there are several rows."""
    if bits == 0 and dtype == torch.bfloat16:
        monkeypatch.setattr(blocks_cpu, "most_rows", lambda dtype: 8)  # with more than four torch multiplies
        monkeypatch.setattr(inference_cpu, "most_rows", lambda dtype: 8)
    model = make_model(**SHAPE).to(dtype).quantize(bits)
    assert_equal_to_modules(model, served, *SHAPES[shape])


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
def test_equal_for_other_configurations(make_model, served, change):
    assert_equal_to_modules(make_model(**change).half().quantize(4), served, 2, 2)


def test_equal_with_groups_and_float_layers_between(make_model, served):
    """A scale for 32 inputs, layers that are not quantized, and int8 tables beside the blocks."""
    options = {"group_size": 32, "skip": ["layers.1", "dense"], "embedding": True, "output_layer": True}
    assert_equal_to_modules(make_model().half().quantize(4, **options), served)


def test_a_bfloat16_model_with_float32_norms(make_model, served):
    model = make_model().bfloat16().quantize(8)
    for block in model.transformer.encoder.layers:
        block.input_layernorm.float(), block.post_attention_layernorm.float()
    assert_equal_to_modules(model, served)


def test_results_do_not_depend_on_threads(make_model, served):
    model, before, results = make_model(**SHAPE).half().quantize(4), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(steps(model, 2, 3))
    finally:
        torch.set_num_threads(before)
    assert served == [False, True, True, True] * 3
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_greedy_answers(tiny_model, tokenizer, served):
    for query, answer in ANSWERS.items():
        assert tiny_model.chat(tokenizer, query, do_sample=False)[0] == answer
    assert sum(served) > 20


def test_the_cache_grows_and_shrinks(make_model, served):
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

    pair = by_c_and_by_modules(run)
    assert sum(served) == 12 and all(map(torch.equal, *pair))


@pytest.fixture
def left(monkeypatch):
    """For each call of the C code from here on, whether it was left to the modules afterwards."""
    record, compute = [], blocks_cpu.BlocksInC.compute

    def recorded(*args):
        record.append(True)
        y = compute(*args)
        record[-1] = False
        return y

    monkeypatch.setattr(blocks_cpu.BlocksInC, "compute", recorded)
    return record


def test_float32_overflow_is_left_to_the_modules(make_model, left):
    """|q| * |x| of int8 may exceed float32 though the product does not: the modules multiply again, scaled."""
    model, ids = make_model(num_layers=1).quantize(8), some_ids(1, 13)
    mlp = model.transformer.encoder.layers[0].mlp
    with torch.no_grad():
        mlp.dense_4h_to_h.weight_scale.mul_(1e-37)
        mlp.dense_h_to_4h.weight_scale.mul_(1e18)
        cache = DynamicCache()
        model(ids[:, :12], past_key_values=cache)
        output = model(ids[:, 12:], past_key_values=cache)
        want = model(ids).logits[:, -1:]
    assert left == [True] and cache.get_seq_length() == 13 and output.logits.isfinite().all()
    torch.testing.assert_close(output.logits, want, atol=1e-4, rtol=1e-3)


def test_an_overflow_that_the_softmax_would_hide(make_model, left):
    """A key of -inf gets no weight, so the output is finite; it must not go into the cache."""
    model, ids = make_model(num_layers=1).quantize(8), some_ids(1, 13)
    block = model.transformer.encoder.layers[0]
    layer, row = block.self_attention.query_key_value, 64 + 15  # the first group's key begins at row 64
    with torch.no_grad():
        block.input_layernorm.weight[0] = 3e36
        released = layer.state_dict()
        released["weight"][row] = torch.tensor([127] + [0] * 63)
        released["weight_scale"][row] = 3e-37 / 127
        layer.load_state_dict(released)

    @torch.no_grad()
    def run():
        cache = DynamicCache()
        model(ids[:, :12], past_key_values=cache)
        model(ids[:, 12:], past_key_values=cache)
        return cache.layers[0].keys

    keys, want = by_c_and_by_modules(run)
    assert left == [True] and keys.isfinite().all() and torch.equal(keys, want)


def test_beams_and_a_prefix(make_model, served):
    """A cache whose rows are reordered at every step, behind P-Tuning's prefix, in inference mode."""
    model, options = make_model(pre_seq_len=4), {"num_beams": 3, "do_sample": False, "max_new_tokens": 12}
    with torch.inference_mode():
        pair = by_c_and_by_modules(lambda: model.generate(some_ids(2, 5), **options))
    assert sum(served) >= 10 and torch.equal(*pair)


def test_a_long_context_and_a_mask_in_another_order(make_model, served):
    """More than one stretch of keys; a mask whose last dimension is not dense."""
    model, ids = make_model(), some_ids(2, 1104)
    mask = torch.ones(2, 1, 4, 1104, dtype=torch.bool).tril(1100)
    mask[1, :, :, :700] = False
    mask = mask.transpose(2, 3).contiguous().transpose(2, 3)

    @torch.no_grad()
    def run():
        cache = DynamicCache()
        model(ids[:, :1100], past_key_values=cache)
        return model(ids[:, 1100:], past_key_values=cache, attention_mask=mask).logits

    pair = by_c_and_by_modules(run)
    assert served == [False, True] and torch.equal(*pair)


def test_float_layers_need_no_quantized_kernels(make_model, served, monkeypatch):
    """They are not compiled in the middle of a float model's first answer."""
    blocks_cpu.quantized_products.cache_clear()
    monkeypatch.setattr(blocks_cpu, "load_quantized", lambda: pytest.fail("loaded"))
    steps(make_model())
    assert served == [False, True, True, True]


# What is left to the modules


def blocks_of(model):
    return model.transformer.encoder.layers


def replace_attention(model):
    blocks_of(model)[1].self_attention.__class__ = type("Other", (modeling_chatglm.SelfAttention,), {})


def replace_mlp_forward(model):
    mlp = blocks_of(model)[2].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)


def replace_add(model):
    blocks_of(model)[1].add = lambda x, normed, update: x - update


def wrap_linear(model):
    attention = blocks_of(model)[0].self_attention
    attention.dense = torch.nn.Sequential(attention.dense)


def train_a_block(model):
    blocks_of(model)[1].dropout.p = 0.0
    blocks_of(model)[1].train()


def swap_blocks(model):
    """The cache's layers stay with the blocks."""
    blocks = blocks_of(model)
    model.transformer.encoder.layers = torch.nn.ModuleList([blocks[1], blocks[0], blocks[2]])


def replace(path, make):
    """A change that puts another module at this place of a block."""
    place, _, name = path.rpartition(".")
    return lambda model: setattr(blocks_of(model)[1].get_submodule(place), name, make())


def random_linear():
    return modeling_chatglm.Linear(64, 64)


def other_dropout(model):
    del blocks_of(model)[1].dropout
    blocks_of(model)[1].dropout = types.SimpleNamespace(training=False)


def set_weight(kind):
    def change(model):
        layer = blocks_of(model)[1].mlp.dense_4h_to_h
        weight = layer.weight.detach()
        del layer.weight
        if kind == "buffer":
            layer.register_buffer("weight", weight)
        else:
            layer.weight = weight if kind == "attribute" else torch.nn.Parameter(weight.to_sparse_csr())

    return change


OTHERS = {
    "a hook": lambda model: blocks_of(model)[1].mlp.register_forward_hook(lambda module, args, y: 2 * y),
    "a hook before": lambda model: blocks_of(model)[0].register_forward_pre_hook(lambda *args: None),
    "a subclass": replace_attention,
    "a forward of its own": replace_mlp_forward,
    "a method of its own": replace_add,
    "a wrapped layer": wrap_linear,
    "a linear layer for an MLP": replace("mlp", random_linear),
    "a linear layer for a norm": replace("input_layernorm", random_linear),
    "a norm for a linear layer": replace("self_attention.dense", lambda: modeling_chatglm.RMSNorm(64, 1e-5)),
    "a dropout that is no module": other_dropout,
    "norms of two dtypes": lambda model: blocks_of(model)[1].input_layernorm.half(),
    "norms of two epsilons": lambda model: setattr(blocks_of(model)[1].post_attention_layernorm, "eps", 0.1),
    "blocks of two epsilons": lambda model: [setattr(m, "eps", 0.1) for m in blocks_of(model)[2].children()],
    "attentions of two scales": lambda model: setattr(blocks_of(model)[1].self_attention, "scaling", 1.0),
    "blocks in another order": swap_blocks,
    "a weight that is a buffer": set_weight("buffer"),
    "a weight that is an attribute": set_weight("attribute"),
    "a sparse weight": set_weight("sparse"),
    "a block in training": train_a_block,
    "a compiled block": lambda model: blocks_of(model)[1].compile(backend="eager"),
    "eager attention": lambda model: setattr(model.config, "_attn_implementation", "eager"),
}


@pytest.mark.parametrize("change", OTHERS)
def test_left_to_the_modules(make_model, served, change):
    """What C would pass over: the modules compute, from the first step on."""
    model = make_model()
    OTHERS[change](model)
    pair = by_c_and_by_modules(lambda: steps(model))
    assert served == [False] * 4 and all(map(torch.equal, *pair))


@pytest.mark.parametrize("path", ["mlp", "self_attention", "mlp.dense_4h_to_h"])
@pytest.mark.parametrize("what", ["a block", "nothing"])
def test_errors_are_those_of_the_modules(make_model, what, path):
    """A block within a block, and an empty place, whose call fails."""
    model = make_model()
    cache = prompted(model)
    replace(path, lambda: blocks_of(make_model())[1] if what == "a block" else None)(model)

    def error():
        with torch.no_grad(), pytest.raises((AttributeError, TypeError)) as caught:
            model(some_ids(1, 1), past_key_values=cache)
        return repr(caught.value)

    by_c, by_modules = by_c_and_by_modules(error)
    assert by_c == by_modules


def test_a_weight_that_is_gone(make_model):
    """The modules' own error, and no reading at address 0."""
    model = make_model()
    steps(model)
    blocks_of(model)[1].mlp.dense_4h_to_h.weight = None
    with torch.no_grad(), pytest.raises((AttributeError, TypeError)):
        model(some_ids(1, 1), past_key_values=prompted(make_model()))


def prompted(model, rows=1, tokens=12):
    """The cache of a prompt."""
    cache = DynamicCache()
    with torch.no_grad():
        model(some_ids(rows, tokens), past_key_values=cache)
    return cache


def test_a_scale_of_the_wrong_length(make_model, served):
    model = make_model().half().quantize(4)
    cache, layer = prompted(model), blocks_of(model)[1].mlp.dense_4h_to_h
    layer.weight_scale = torch.nn.Parameter(layer.weight_scale[:3].clone())
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        model(some_ids(1, 1), past_key_values=cache)
    assert served == [False, False]


def test_layers_of_the_cache_with_other_lengths(make_model, served):
    """What a user's eviction may leave: the modules take it or refuse it."""
    model = make_model()
    cache = prompted(model)
    cache.layers[1].keys, cache.layers[1].values = (t[:, :, 1:] for t in (cache.layers[1].keys, cache.layers[1].values))
    with torch.no_grad():
        model(some_ids(1, 1), past_key_values=cache)
    assert served == [False, False]


@pytest.mark.parametrize("name", ["rotate", "gated", "rms_norm"])
def test_a_function_replaced_in_the_file(make_model, served, monkeypatch, name):
    model, original = make_model(), getattr(modeling_chatglm, name)
    monkeypatch.setattr(modeling_chatglm, name, lambda *args: original(*args) * 2)
    steps(model)
    assert served == [False] * 4


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
    assert served == [False] * 4 and len(calls) == 4 * 3


@pytest.mark.parametrize("flag", ["rmsnorm", "multi_query_attention", "apply_residual_connection_post_layernorm"])
def test_other_networks(make_model, served, make_config, flag):
    steps(make_model(**{flag: not getattr(make_config(), flag)}))
    assert served == [False] * 4


def test_float32_residuals(make_model, served):
    """The modules compute them, and C is not asked."""
    steps(make_model(fp32_residual_connection=True).half())
    assert served == []


def test_a_final_norm_of_another_dtype(make_model, served):
    model = make_model().bfloat16().quantize(4)
    model.transformer.encoder.final_layernorm.register_forward_hook(lambda module, args, y: y.float())
    assert_equal_to_modules(model, served)


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
