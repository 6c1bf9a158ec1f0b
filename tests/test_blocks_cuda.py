"""blocks_cuda without a GPU: what a CUDA graph holds, when it is captured, and when it may be replayed.

Here a "graph" is the captured work, run again: it sees only the tensors that a replay sees. test_cuda_device.py has the
same on a card, and test_blocks_cuda_card.py what a card does around it.
"""

import contextlib
import copy
import functools
import threading
import types

import pytest
import torch
from chatglm2 import attention_chatglm, blocks_cuda, modeling_chatglm
from chatglm2.transformers_compat import DynamicCache
from model_helpers import CLOSE, some_ids
from test_blocks_cpu import OTHERS, SHAPES, by_modules, steps

pytestmark = pytest.mark.needs_transformers("4.57", "caches of layers")
MODULES, CAPTURED, REPLAYED = "modules", "captured", "replayed"
# what a graph computes as well as the modules: C is written for blocks of one kind, a graph holds any
OF_ANY_KIND = ("norms of two dtypes", "two epsilons", "attentions of two scales")


class FakeCard(blocks_cuda.Card):
    """A card whose graphs run on the CPU."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.record = []

    def begin_turn(self):
        self.done = types.SimpleNamespace(record=lambda stream: None)

    def capture(self, work):
        self.record[-1] = CAPTURED

        def replay():
            self.record[-1] = REPLAYED
            return work()

        return work(), replay


@pytest.fixture
def card(monkeypatch):
    """In `record`, what has computed the blocks in each forward pass from here on."""
    card, classes = FakeCard(), modeling_chatglm.blocks_at_once["cuda"]
    monkeypatch.setattr(blocks_cuda, "serves", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(blocks_cuda, "CARDS", {torch.device("cpu"): card})
    monkeypatch.setattr(attention_chatglm, "computes_attention", lambda *args: False)  # as on a GPU

    def compute(*args):
        card.record.append(MODULES)
        return classes(*args)

    monkeypatch.setitem(modeling_chatglm.blocks_at_once, "cpu", compute)
    return card


def assert_as_by_modules(run):
    """The tensors that `run` returns, by the modules and then by what serves."""
    with by_modules():
        want = run()
    for got, expected in zip(run(), want):
        torch.testing.assert_close(got, expected, **CLOSE)


def assert_equal_to_modules(model, *shape):
    assert_as_by_modules(lambda: steps(model, *shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [0, 4])
def test_equal_to_the_modules(make_model, card, bits, shape):
    """Logits, keys and values, with padding where there are several rows; prompt, first step, capture, replay."""
    assert_equal_to_modules(make_model().quantize(bits), *SHAPES[shape])
    assert card.record == [MODULES, MODULES, CAPTURED, REPLAYED]


@pytest.mark.parametrize(
    "change",
    [
        {"add_bias_linear": True},
        {"kv_channels": 32, "num_attention_heads": 2, "multi_query_group_num": 1},
        {"post_layer_norm": False},
        {"rope_ratio": 4.0, "rope_ratio_type": "base"},
    ],
    ids=str,
)
def test_equal_for_other_configurations(make_model, card, change):
    assert_equal_to_modules(make_model(**change), 2, 2)
    assert card.record[-1] == REPLAYED


def test_a_replay_is_not_changed_by_the_next(make_model, card):
    """Without a final norm the blocks' result is the model's: it must not be a buffer of the graph."""
    model, cache = make_model(post_layer_norm=False), prompted(make_model())
    ids = some_ids(1, 5)
    with torch.no_grad():
        outputs = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5)]
        held = [output.clone() for output in outputs]
        model(ids[:, :1], past_key_values=cache)
    assert card.record.count(REPLAYED) == 4 and all(map(torch.equal, outputs, held))


def prompted(model, rows=1, tokens=12):
    cache = DynamicCache()
    with torch.no_grad():
        model(some_ids(rows, tokens), past_key_values=cache)
    return cache


def decode(model, cache, count=1, rows=1):
    with torch.no_grad():
        return [model(some_ids(rows, 1, seed), past_key_values=cache).logits for seed in range(count)]


def test_the_cache_grows_and_shrinks(make_model, card):
    """Beyond the room of its buffers there are new ones, and the modules compute one step; not so after a crop."""
    model, ids = make_model(), some_ids(1, 300)

    @torch.no_grad()
    def run():
        cache, results = DynamicCache(), []
        model(ids[:, :250], past_key_values=cache)
        for i in range(250, 264):
            results.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
            if i == 259:
                cache.crop(-4)
        return results

    assert_as_by_modules(run)
    assert card.record == [MODULES, *[MODULES, CAPTURED] + 4 * [REPLAYED], *[MODULES, CAPTURED] + 6 * [REPLAYED]]


def test_conversations_in_turns(make_model, card):
    """Each cache has its graphs, which go with it."""
    model = make_model()
    caches = [prompted(model), prompted(model, tokens=7)]
    with by_modules():
        want = [decode(model, copy.deepcopy(cache), 4) for cache in caches]
    got, pairs = [[], []], [MODULES, MODULES, CAPTURED, CAPTURED] + 4 * [REPLAYED]
    card.record.clear()
    for seed in range(4):
        for cache, results in zip(caches, got):
            with torch.no_grad():
                results.append(model(some_ids(1, 1, seed), past_key_values=cache).logits)
    assert card.record == pairs
    for results, expected in zip(got, want):
        for one, other in zip(results, expected):
            torch.testing.assert_close(one, other, **CLOSE)
    graphs = modeling_chatglm.blocks_at_once["cuda"].steps
    held = [cache.layers[0] in graphs for cache in caches]
    count = len(graphs)
    del cache, caches
    assert held == [True, True] and len(graphs) == count - 2


def test_drafts_of_several_lengths(make_model, card):
    """Steps of 1 and of 3 tokens in turns: each length has its graph."""
    model, ids = make_model(), some_ids(1, 40)
    lengths = [1, 3, 1, 3, 1, 3]

    @torch.no_grad()
    def run():
        cache, seen, results = prompted(model), 12, []
        for length in lengths:
            results.append(model(ids[:, seen : seen + length], past_key_values=cache).logits)
            seen += length
        return results

    assert_as_by_modules(run)
    assert card.record[1:] == [MODULES, MODULES, CAPTURED, CAPTURED, REPLAYED, REPLAYED]


def test_a_mask_that_is_not_causal(make_model, card):
    """New tokens that attend to each other in both directions."""
    model, ids = make_model(), some_ids(2, 24)

    @torch.no_grad()
    def run():
        cache, results = DynamicCache(), []
        model(ids[:, :12], past_key_values=cache)
        for seen in (12, 15, 18, 21):
            hidden = torch.zeros(2, 3, seen + 3, dtype=torch.bool)
            hidden[:, 1, :4] = True
            step = {"past_key_values": cache, "full_attention_mask": hidden}
            results.append(model(ids[:, seen : seen + 3], **step).logits)
        return results

    assert_as_by_modules(run)
    assert card.record[-1] == REPLAYED


def test_a_mask_that_was_longer(make_model, card):
    """After a crop in place, a mask's end is left over from the step before."""
    model, ids = make_model(), some_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    @torch.no_grad()
    def run():
        cache, results = DynamicCache(), []
        model(ids[:, :12], past_key_values=cache, attention_mask=mask[:, :12])
        for seen in (12, 13, 14, 15, 13, 14):
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :seen], layer.values[:, :, :seen]
            step = {"past_key_values": cache, "attention_mask": mask[:, : seen + 1]}
            results.append(model(ids[:, seen : seen + 1], **step).logits)
        return results

    assert_as_by_modules(run)
    assert card.record[-4:] == 4 * [REPLAYED]


def move_weight(model):
    layer = model.transformer.encoder.layers[1].mlp.dense_4h_to_h
    layer.weight = torch.nn.Parameter(layer.weight * 2)


def other_data(model):
    layer = model.transformer.encoder.layers[1].mlp.dense_4h_to_h
    layer.weight.data = layer.weight.data * 2


def lose_bias(model):
    model.transformer.encoder.layers[0].self_attention.query_key_value.bias = None


def other_eps(model):
    model.transformer.encoder.layers[2].input_layernorm.eps = 0.1


def prune(model):
    mlp = model.transformer.encoder.layers[1].mlp
    mlp.dense_4h_to_h.weight.data = mlp.dense_4h_to_h.weight.data[:, ::2]
    half = mlp.dense_h_to_4h.weight.data[: mlp.dense_h_to_4h.weight.shape[0] // 2]
    mlp.dense_h_to_4h.weight.data = half


CHANGES = {
    "fewer channels": prune,
    "a new weight": move_weight,
    "new data": other_data,
    "no bias": lose_bias,
    "another epsilon": other_eps,
}
CHANGES["a norm's weight"] = lambda model: setattr(
    model.transformer.encoder.layers[0].input_layernorm, "weight", torch.nn.Parameter(2 * torch.ones(64))
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(make_model, card, change):
    """What replaces a parameter between two steps: the modules compute the next, and a new graph the ones after."""
    model = make_model()
    cache = prompted(model)
    decode(model, cache, 6)
    with torch.no_grad():
        CHANGES[change](model)
    other = copy.deepcopy(cache)
    with by_modules():
        want = decode(model, other, 3)
    card.record.clear()
    for got, expected in zip(decode(model, cache, 3), want):
        torch.testing.assert_close(got, expected, **CLOSE)
    assert card.record == [MODULES, CAPTURED, REPLAYED]


def test_a_change_in_place_needs_no_new_graph(make_model, card):
    model = make_model()
    cache = prompted(model)
    decode(model, cache, 3)
    with torch.no_grad():
        model.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight.mul_(2)
    with by_modules():
        want = decode(model, copy.deepcopy(cache))
    torch.testing.assert_close(decode(model, cache), want, **CLOSE)
    assert card.record[-1] == REPLAYED


@pytest.mark.parametrize("change", [change for change in OTHERS if not change.endswith(OF_ANY_KIND)])
def test_left_to_the_modules(make_model, card, change):
    model = make_model()
    OTHERS[change](model)
    with by_modules():
        want = steps(model)
    assert all(map(torch.equal, steps(model), want)) and set(card.record) == {MODULES}


@pytest.mark.parametrize("change", [change for change in OTHERS if change.endswith(OF_ANY_KIND)])
def test_blocks_of_several_kinds(make_model, card, change):
    model = make_model()
    OTHERS[change](model)
    assert_equal_to_modules(model)
    assert card.record[-1] == REPLAYED


def test_a_bias_that_is_an_attribute(make_model, card):
    model = make_model()
    layer = model.transformer.encoder.layers[1].self_attention.query_key_value
    bias = layer.bias.detach()
    del layer.bias
    layer.bias = bias
    steps(model)
    assert set(card.record) == {MODULES}


def test_switched_off(make_model, card):
    model = make_model(cuda_graphs=False)
    steps(model)
    assert set(card.record) == {MODULES}


def test_calls_that_ask_for_more(make_model, card):
    """Gradients, attention weights, autocast, a mask of numbers, a prompt of many tokens."""
    model = make_model()
    cache = prompted(model)
    for _ in range(3):
        model(some_ids(1, 1), past_key_values=prompted(model))
    with torch.no_grad():
        for _ in range(3):
            model(some_ids(1, 1), past_key_values=cache, output_attentions=True)
            model(some_ids(1, 17), past_key_values=cache)
            numbers = torch.zeros(1, 1, 1, cache.get_seq_length() + 1)
            model(some_ids(1, 1), past_key_values=cache, attention_mask=numbers)
            with torch.autocast("cpu", torch.bfloat16):
                model(some_ids(1, 1), past_key_values=cache)
    assert set(card.record) == {MODULES}


def test_in_and_out_of_inference_mode(make_model, card):
    """A graph made in inference mode is filled outside it."""
    model = make_model()
    with torch.inference_mode():
        assert_equal_to_modules(model)
        cache = prompted(model)
    with torch.no_grad():
        decode(model, cache, 4)
    with torch.inference_mode():
        decode(model, cache, 2)
    assert card.record[-1] == REPLAYED


def test_beams(make_model, card):
    """A cache whose rows are reordered at every step has new buffers at every step."""
    model, options = make_model(), {"num_beams": 3, "do_sample": False, "max_new_tokens": 12}
    with by_modules():
        want = model.generate(some_ids(2, 5), **options)
    assert torch.equal(model.generate(some_ids(2, 5), **options), want)


def test_no_capture_while_another_thread_computes(make_model, card, monkeypatch):
    """torch refuses random numbers in all threads meanwhile. A graph that is there is replayed; time passes."""
    model, now = make_model(), 1000.0
    monkeypatch.setattr(blocks_cuda.time, "monotonic", lambda: now)
    first = prompted(model)
    decode(model, first, 3)
    other = threading.Thread(target=decode, args=(model, prompted(model)))
    other.start(), other.join()
    cache = prompted(model)
    card.record.clear()
    decode(model, cache, 3), decode(model, first, 1)
    assert card.record == [MODULES, MODULES, MODULES, REPLAYED]
    now += blocks_cuda.PATIENCE + 1
    decode(model, cache, 2)
    assert card.record[4:] == [CAPTURED, REPLAYED]


def test_no_thread_is_left_after_generate(make_model, card):
    """A server's next request comes in another thread of its pool."""
    model = make_model()
    for _ in range(2):
        work = functools.partial(model.generate, some_ids(1, 5), max_new_tokens=5, min_new_tokens=5)
        thread = threading.Thread(target=work)
        thread.start(), thread.join()
    assert card.threads == {} and card.record == 2 * [MODULES, MODULES, CAPTURED, REPLAYED, REPLAYED]


def test_a_thread_waits_while_another_captures(make_model, card):
    model, entered = make_model(), threading.Event()

    def work():
        prompted(model)
        entered.set()

    with card.lock:
        thread = threading.Thread(target=work)
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(10)
    thread.join()


def test_what_is_captured_reads_no_value(make_model):
    """On the meta device, which has none: a graph cannot wait for a value, nor go another way for it."""
    model, meta = make_model(), torch.device("meta")
    config = model.config
    shapes = (2, config.num_key_value_heads, 256, config.kv_channels)
    model.to(meta)
    x, rotary = torch.empty(2, 3, 64, device=meta), [torch.empty(1, 3, 1, 4, device=meta) for _ in range(2)]
    buffers = [(torch.empty(shapes, device=meta), torch.empty(shapes, device=meta)) for _ in range(3)]
    step = blocks_cuda.Step([])
    with torch.no_grad():
        step.make_inputs(x, rotary, torch.empty(2, 1, 3, 20, dtype=torch.bool, device=meta), buffers)
        assert step.compute(model.transformer.encoder.layers, buffers).shape == x.shape


def test_graphs_that_do_not_pay(make_model, card):
    """A cache whose keys others hold gets new buffers when it is cropped: captures become rare."""
    model, cache, ids, held = make_model(), prompted(make_model()), some_ids(1, 3), []

    def draft(crop):
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model(ids, past_key_values=cache)
        if crop:
            held.append(cache.layers[-1].keys)
            cache.crop(-1)

    card.record.clear()
    for _ in range(40):
        draft(crop=True)
    assert card.record.count(CAPTURED) == 1
    for _ in range(30):
        draft(crop=False)
    assert card.record[-20:] == 20 * [REPLAYED]


def test_wide_batches_are_left_to_the_modules(make_model, card):
    model = make_model()
    rows = blocks_cuda.MOST_ROWS
    decode(model, prompted(model, rows + 1), 3, rows + 1), decode(model, prompted(model, rows), 3, rows)
    assert card.record == [MODULES] * 6 + [CAPTURED, REPLAYED]


def test_a_turn_that_does_not_come(make_model, card, monkeypatch):
    """The lock's holder may wait for this thread: a collected iterator ends its worker while a graph is captured."""
    model = make_model()
    cache = prompted(model)
    decode(model, cache, 3)
    monkeypatch.setattr(blocks_cuda, "LONGEST_WAIT", 0.01)
    with card.lock:
        thread = threading.Thread(target=decode, args=(model, cache, 2))
        thread.start()
        thread.join(10)
        blocks_cuda.leave()
    assert not thread.is_alive() and card.record[-2:] == [MODULES, MODULES]
    decode(model, cache)
    assert card.record[-1] == REPLAYED


def test_after_a_failure_the_next_try_is_not_the_next_step(make_model, card, monkeypatch):
    monkeypatch.setattr(FakeCard, "capture", lambda card, work: (card.record.append(CAPTURED), (work(), None))[1])
    monkeypatch.setattr(blocks_cuda, "AFTER_A_FAILURE", 5)
    model = make_model()
    decode(model, prompted(model), 10)
    assert card.record.count(CAPTURED) == 2


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_defaults_of_the_caller(make_model, card, default):
    """Its tensors are where the model is, and of the rotation's dtype."""
    model = make_model()
    with by_modules():
        want = decode(model, prompted(model), 4)
    cache, ids = prompted(model), [some_ids(1, 1, seed) for seed in range(4)]
    try:
        if default == "dtype":
            torch.set_default_dtype(torch.bfloat16)
        with torch.no_grad(), torch.device("meta") if default == "device" else contextlib.nullcontext():
            got = [model(each, past_key_values=cache).logits for each in ids]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, want, **CLOSE)
    assert card.record[-1] == REPLAYED
