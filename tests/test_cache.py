"""The cache that grows in place holds what transformers' own holds, whatever is done to it in between."""

import copy
import inspect

import pytest
import torch
from chatglm2.transformers_compat import DynamicCache

pytestmark = pytest.mark.needs_transformers("4.57", "caches made of layers that say when they hold something")


@pytest.fixture
def pair():
    """(transformers' cache, ours), empty."""
    from chatglm2.transformers_compat import grow_in_place

    plain, growing = DynamicCache(), DynamicCache()
    grow_in_place(growing)
    return plain, growing


def feed(caches, length, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, 2, length, 4, generator=generator) for _ in range(2))
    plain, growing = (cache.update(key, value, 0) for cache in caches)
    assert torch.equal(plain[0], growing[0]) and torch.equal(plain[1], growing[1])
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


@pytest.mark.needs_transformers("5.0", "a quantized cache with this signature")
def test_transformers_quantized_cache(tiny_model, tokenizer):
    """`cache_implementation="quantized"` rounds all but the newest keys and values to 4 bits: the answer stays."""
    pytest.importorskip("optimum.quanto")
    settings = {"do_sample": False, "cache_implementation": "quantized"}
    settings["cache_config"] = {"backend": "quanto", "nbits": 4, "residual_length": 8, "q_group_size": 32}
    query = "你好"
    output = tiny_model.generate(
        **tokenizer([tokenizer.build_prompt(query)], return_tensors="pt"),
        max_new_tokens=32,
        return_dict_in_generate=True,
        **settings,
    )
    assert output.past_key_values.layers[0].keys.shape[2] <= 8 < output.past_key_values.get_seq_length()
    assert tiny_model.chat(tokenizer, query, **settings)[0] == tiny_model.chat(tokenizer, query, do_sample=False)[0]


@pytest.mark.needs_transformers("5.0", "DynamicCache(offloading=True)")
def test_transformers_offloaded_cache(tiny_model, tokenizer, monkeypatch):
    """An offloaded cache, the second device and the streams played: a layer's keys are there in time only."""

    class Stream:
        __enter__ = __exit__ = wait_stream = lambda *_: None

    def offload(layer):
        layer.parked, layer.keys, layer.values = (layer.keys, layer.values), None, None

    def prefetch(layer):
        if layer.is_initialized and layer.keys is None:
            layer.keys, layer.values = layer.parked

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    cache = DynamicCache(config=tiny_model.config, offloading=True)
    for name, method in (("offload", offload), ("prefetch", prefetch)):
        monkeypatch.setattr(type(cache.layers[0]), name, method)
    inputs = tokenizer([tokenizer.build_prompt("你好")], return_tensors="pt")
    ids = tiny_model.generate(**inputs, max_new_tokens=16, do_sample=False, past_key_values=cache)
    assert cache.layers[-1].keys is None and cache.layers[-1].parked[0].shape[2] == ids.shape[1] - 1
    assert torch.equal(ids, tiny_model.generate(**inputs, max_new_tokens=16, do_sample=False))


def test_growth_across_buffers(pair):
    """A prompt, then single tokens across two buffers' ends: the same keys and values at every step."""
    feed(pair, 250, 0)
    for step in range(300):
        feed(pair, 1, step + 1)


def test_step_writes_in_place(pair):
    """Within its room the buffer stays where it is: nothing is copied."""
    _, growing = pair
    feed(pair, 5, 0)
    place = growing.layers[0].keys.data_ptr()
    for step in range(200):
        feed(pair, 1, step + 1)
    assert growing.layers[0].keys.data_ptr() == place


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "deepcopy", "reset", "stride"])
def test_update_after_a_change(pair, change):
    """After crop, beam reordering, repetition, selection, a copy, a reset or eviction, both caches go on alike."""
    feed(pair, 7, 0)
    feed(pair, 1, 1)
    batch, others = 2, ()
    if change == "deepcopy":
        others, pair = pair, copy.deepcopy(pair)
    for cache in pair:
        if change == "crop":
            cache.crop(-3)
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1]))
        elif change == "reset":
            cache.reset()
        elif change == "stride":  # every other token, by hand: a view that begins where the buffer does
            layer = cache.layers[0]
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
    batch = {"repeat": 4, "select": 1}.get(change, 2)
    for step in range(3):
        feed(pair, 1, step + 2, batch)
    if others:  # the original is not written to
        feed(others, 1, 9)


def test_rows_that_do_not_fit_are_rejected(make_model):
    """One new row for a cache of four would be written into all of them: an error, as torch.cat gives."""
    model, cache = make_model(), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]] * 4), past_key_values=cache)
        with pytest.raises(ValueError, match="The cache holds 4 rows .* the new tokens have 1"):
            model(torch.tensor([[8]]), past_key_values=cache)


def test_tensors_read_before_a_crop_are_unchanged(pair):
    """Keys taken before a crop are not overwritten by what comes after it."""
    _, growing = pair
    feed(pair, 7, 0)
    before = growing.layers[0].keys
    kept = before.clone()
    growing.crop(-2)
    growing.update(torch.zeros(2, 2, 2, 4), torch.zeros(2, 2, 2, 4), 0)
    assert torch.equal(before, kept)


@pytest.mark.parametrize("held", ["keys", "values", "a view", "nothing"])
def test_after_a_crop_the_buffer_is_written_in_place_if_nobody_else_holds_it(pair, held):
    """A refused draft copies nothing."""
    _, growing = pair
    feed(pair, 7, 0)
    layer = growing.layers[0]
    place = layer.keys.data_ptr()
    others = {"keys": layer.keys, "values": layer.values, "a view": layer.keys[0, 0], "nothing": None}[held]
    kept = None if others is None else others.clone()
    feed(pair, 2, 1)
    for cache in pair:
        cache.crop(-4)
    feed(pair, 2, 2)
    assert (layer.keys.data_ptr() == place) == (held == "nothing")
    assert kept is None or torch.equal(others, kept)


def test_crop_of_nothing_keeps_the_buffer(pair):
    """Assisted decoding crops after every step, mostly nothing: the next token is still written in place."""
    _, growing = pair
    feed(pair, 7, 0)
    place = growing.layers[0].keys.data_ptr()
    growing.crop(0 if "tokens_to_remove" in inspect.signature(DynamicCache.crop).parameters else 7)
    growing.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4), 0)
    assert growing.get_seq_length() == 8 and growing.layers[0].keys.data_ptr() == place


def test_dtypes_are_promoted(pair):
    """A bfloat16 round and then a float32 one: float32 from then on, as torch.cat gives."""
    for cache in pair:
        cache.update(torch.ones(1, 2, 3, 4).bfloat16(), torch.ones(1, 2, 3, 4).bfloat16(), 0)
    key, value = torch.rand(1, 2, 1, 4), torch.rand(1, 2, 1, 4)
    plain, growing = (cache.update(key, value, 0) for cache in pair)
    assert growing[0].dtype == torch.float32 and torch.equal(plain[0], growing[0]) and torch.equal(plain[1], growing[1])


def test_generate_uses_growing_layers(make_model):
    """The cache that `generate` makes itself grows in place, and one handed out by forward does."""
    from chatglm2.transformers_compat import GrowingLayer

    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert {type(layer) for layer in out.past_key_values.layers} == {GrowingLayer}
    with torch.no_grad():
        assert type(model(ids).past_key_values.layers[0]) is GrowingLayer


def test_training_concatenates(make_model):
    """Gradients flow through cached keys: what needs a gradient is never written in place."""
    model, ids = make_model(), torch.tensor([[5, 6, 7, 8]])
    cache = DynamicCache()
    model(ids[:, :2], past_key_values=cache)
    loss = model(ids[:, 2:], past_key_values=cache).logits.square().mean()
    loss.backward()
    weight = model.transformer.encoder.layers[0].self_attention.query_key_value.weight
    assert weight.grad.abs().sum() > 0


@pytest.mark.needs_transformers("4.57", "caches of layers")
def test_keys_and_values_keep_their_own_dtypes():
    from chatglm2.transformers_compat import GrowingLayer

    layer, new = GrowingLayer(), torch.randn(1, 2, 3, 8)
    for tokens in (3, 1):
        keys, values = layer.update(new[:, :, :tokens].half(), new[:, :, :tokens])
    assert (keys.dtype, values.dtype) == (torch.float16, torch.float32)
    assert torch.equal(values, torch.cat((new, new[:, :, :1]), dim=2))
