"""modeling_chatglm: every way to compute the same thing gives the same result."""

import copy

import pytest
import torch
from chatglm2 import modeling_chatglm
from chatglm2.modeling_chatglm import ChatGLMForSequenceClassification, ChatGLMModel, rotary_cos_sin, rotate
from chatglm2.transformers_compat import DynamicCache
from model_helpers import CLOSE, logits, some_ids

# Batches and caches


def test_left_padding_does_not_change_results(make_model, padded_batch):
    """The logits and the greedy continuation of each row are those of the row alone."""
    model, (ids, mask, rows) = make_model(), padded_batch
    together = logits(model, ids, attention_mask=mask)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for i, row in enumerate(rows):
        length = row.shape[1]
        torch.testing.assert_close(together[i, -length:], logits(model, row)[0], **CLOSE)
        alone = model.generate(row, max_new_tokens=6, do_sample=False)
        assert generated[i, 9:].tolist()[: alone.shape[1] - length] == alone[0, length:].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_steps_match_a_full_pass(make_model, padded_batch, attention):
    """One token at a time with a cache gives the logits of one pass; positions come from mask and cache."""
    model, (ids, mask, _) = make_model(attention=attention), padded_batch
    whole = logits(model, ids, attention_mask=mask, use_cache=False)
    cache, steps = DynamicCache(), []
    for t in range(ids.shape[1]):
        steps.append(logits(model, ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache))
    steps = torch.cat(steps, dim=1)
    torch.testing.assert_close(steps[mask.bool()], whole[mask.bool()], **CLOSE)


def test_default_positions_continue_from_the_cache(make_model):
    """Without position_ids and mask, positions continue from the cache; the original restarted at 0."""
    model, ids, cache = make_model(), some_ids(), DynamicCache()
    chunks = [logits(model, part, past_key_values=cache) for part in ids.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), logits(model, ids), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_long_prompt_in_chunks(make_model, padded):
    """Last logits of a prompt of 8,192 tokens, in one pass and in chunks of 1,024, with and without padding."""
    model, cache, length = make_model(num_layers=1), DynamicCache(), 8192
    ids, mask = some_ids(length=length)[:1], torch.ones(1, length, dtype=torch.long)
    mask[:, : 100 * padded] = 0
    for begin in range(0, length, 1024):
        part = {"input_ids": ids[:, begin : begin + 1024], "attention_mask": mask[:, : begin + 1024]}
        position_ids = (part["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, begin:]
        chunked = model(**part, position_ids=position_ids, past_key_values=cache, logits_to_keep=1).logits
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False, logits_to_keep=1)
    torch.testing.assert_close(chunked, whole.logits, **CLOSE)


def test_cache_stores_groups_not_heads(make_model):
    """The cache is (B, G, S, D): two groups, not four heads."""
    cache = DynamicCache()
    logits(make_model(), some_ids(), past_key_values=cache)
    key = cache.layers[0].keys if hasattr(cache, "layers") else cache.key_cache[0]
    assert key.shape == (2, 2, 12, 16)


def test_forward_compiles_without_graph_breaks(make_model):
    """torch reports no graph break, and fullgraph=True traces prefill and decode."""
    torch._dynamo.reset()
    model, ids = make_model(), some_ids()
    report = torch._dynamo.explain(model)(input_ids=ids, use_cache=False)  # 4.54, 4.55: a new cache breaks the graph
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        cache = DynamicCache()
        prefill = compiled(input_ids=ids[:, :-1], past_key_values=cache).logits
        step = compiled(input_ids=ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((prefill, step), dim=1), logits(model, ids), **CLOSE)


@torch.no_grad()
def test_forward_never_syncs_with_the_device(make_model):
    """On the meta device `.item()`, `.tolist()` and `if tensor` raise: forward never waits for a GPU."""
    model, cache = make_model().to("meta"), DynamicCache()
    for length in (5, 1, 1):
        ids = torch.zeros(2, length, dtype=torch.long, device="meta")
        scores = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        assert scores.shape == (2, length, model.config.padded_vocab_size)
    assert cache.get_seq_length() == 7


def test_base_model_matches_the_full_model(make_model):
    """ChatGLMModel gives the hidden states of the model that contains it."""
    model, ids = make_model(), some_ids()
    body = make_model(cls=ChatGLMModel)
    body.load_state_dict(model.transformer.state_dict())
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


# Outputs and errors


def test_logits_to_keep(make_model):
    """logits_to_keep=n returns the last n positions, an index tensor the positions in it."""
    model, ids = make_model(), some_ids()
    whole = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=1), whole[:, -1:], **CLOSE)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=torch.tensor([2, 5])), whole[:, [2, 5]], **CLOSE)


def test_hidden_states_and_attentions(make_model):
    """num_layers + 1 hidden states [B, T, C], the last after the final norm; eager weights [B, H, T, S] sum to 1."""
    model, ids = make_model(attention="eager"), some_ids()
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
        core = model.transformer(input_ids=ids)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 12, 64)] * 4
    assert torch.equal(out.hidden_states[-1], core.last_hidden_state)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 12, 12)] * 3
    torch.testing.assert_close(out.attentions[1].sum(-1), torch.ones(2, 4, 12), **CLOSE)
    assert out.attentions[1].triu(1).abs().max() == 0


def test_invalid_inputs_raise_clear_errors(make_model):
    """Ids out of range, a mask of the wrong length, no input, and logits_to_keep with labels."""
    model, ids = make_model(), some_ids()
    with pytest.raises(ValueError, match="range from 3 to 320, but the vocabulary has ids 0 to 319"):
        model(input_ids=torch.tensor([[3, 320]]))
    cache = DynamicCache()
    logits(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="1 columns, but there are 12 cached and 1 new tokens.*13 columns"):
        model(input_ids=ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="set logits_to_keep=0"):
        model(input_ids=ids, labels=ids, logits_to_keep=1)


# Rotary embedding and precision


def test_rotary_embedding_matches_the_formula(make_config):
    """Pair i at position p rotates by p * 10000^(-2i / R); position 0 and the second half are unchanged."""
    config = make_config()
    x = torch.randn(1, 3, 2, 16)
    turned = rotate(x, *rotary_cos_sin(config, torch.tensor([[0, 1, 7]])))
    assert torch.equal(turned[:, 0], x[:, 0]) and torch.equal(turned[..., 8:], x[..., 8:])
    angle = torch.tensor(7 * 10000 ** (-2 / 8), dtype=torch.float32)
    even, odd = x[0, 2, 1, 2], x[0, 2, 1, 3]
    torch.testing.assert_close(turned[0, 2, 1, 2], even * angle.cos() - odd * angle.sin(), **CLOSE)
    torch.testing.assert_close(turned[0, 2, 1, 3], odd * angle.cos() + even * angle.sin(), **CLOSE)


def test_rope_ratio_types(make_config):
    """ "linear" divides the positions, "base" multiplies the base 10000."""
    positions = torch.tensor([[0, 4, 8]])
    plain = rotary_cos_sin(make_config(), positions // 4)
    linear = rotary_cos_sin(make_config(rope_ratio=4, rope_ratio_type="linear"), positions)
    torch.testing.assert_close(linear, plain)
    cos, _ = rotary_cos_sin(make_config(rope_ratio=4, rope_ratio_type="base"), positions)
    frequencies = torch.tensor([40000.0 ** (-2 * i / 8) for i in range(4)])
    torch.testing.assert_close(cos[0, 1, 0], (4 * frequencies).cos())


@pytest.mark.parametrize("kind", ["linear", "base"])
def test_positions_are_distinct_up_to_128k(make_config, kind):
    """With rope_ratio 4 all angles are finite, and the fastest one grows by the same step up to position 131,072."""
    positions = torch.tensor([[0, 1, 65536, 65537, 131071, 131072]])
    config = make_config(rope_ratio=4, rope_ratio_type=kind)
    cos, sin = rotary_cos_sin(config, positions)
    assert cos.isfinite().all() and sin.isfinite().all()
    angle = torch.atan2(sin, cos)[0, :, 0, 0].double()
    step = 0.25 if kind == "linear" else 1.0
    turn = (angle[1::2] - angle[0::2]) % (2 * torch.pi)
    torch.testing.assert_close(turn, torch.full_like(turn, step), atol=0.01, rtol=0)
    cos, sin = rotary_cos_sin(config, torch.arange(0, 131073, 1024)[None])
    slowest = torch.atan2(sin, cos)[0, :, 0, -1].double()
    turn = slowest.diff() % (2 * torch.pi)
    assert 0 < turn.min() < turn.max() < turn.min() + 0.01 < 3  # no turn is missed: monotone


@torch.no_grad()
def test_tiny_checkpoint_at_128k(tiny_model, tokenizer):
    """With rope_ratio 4, logits near position 131,072 match those of the same text at the beginning."""
    model = copy.deepcopy(tiny_model)
    model.config.rope_ratio = 4
    ids = tokenizer(tokenizer.build_prompt("你好"), return_tensors="pt")["input_ids"]
    near = torch.arange(ids.shape[1])[None]
    far = logits(model, ids, position_ids=near + 131072 - ids.shape[1], use_cache=False)
    torch.testing.assert_close(far, logits(model, ids, position_ids=near, use_cache=False), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 2000, 8000, 30000])
def test_half_precision_matches_float32_at_every_position(tiny_model, tokenizer, dtype, offset):
    """The argmax matches float32 at more than 95% of the positions, whatever the offset.

    The original rotated keys and queries in half precision: below 50% from position 3000 on.
    """
    text = tokenizer.build_prompt("彩虹有哪些颜色", [("你好", "你好！"), ("Hello", "Hi there."), ("谢谢", "不客气。")])
    ids = tokenizer(text * 3, return_tensors="pt")["input_ids"]
    positions = torch.arange(ids.shape[1])[None] + offset
    wide = logits(tiny_model, ids, position_ids=positions, use_cache=False)
    half = logits(copy.deepcopy(tiny_model).to(dtype), ids, position_ids=positions, use_cache=False)
    assert (wide.argmax(-1) == half.argmax(-1)).float().mean() > 0.95


@pytest.mark.parametrize("rmsnorm", [True, False])
def test_fp32_residual_connection(make_model, rmsnorm):
    """A float32 residual stream between bfloat16 layers gives results closer to float32."""
    ids = some_ids()
    wide = logits(make_model(rmsnorm=rmsnorm), ids)
    plain = logits(make_model(rmsnorm=rmsnorm).bfloat16(), ids)
    kept = logits(make_model(rmsnorm=rmsnorm, fp32_residual_connection=True).bfloat16(), ids)
    assert plain.dtype == kept.dtype == torch.bfloat16
    assert (kept - wide).norm() < (plain - wide).norm()


def test_dropout_follows_its_module_mode(make_model):
    """Dropout acts in training, and in evaluation only if its own modules are in training mode."""
    model, ids = make_model(hidden_dropout=0.5), torch.tensor([[7, 8, 9]])

    def same():
        with torch.no_grad():
            return torch.equal(model(ids).logits, model(ids).logits)

    assert same() and not (model.train() and same())
    for block in model.eval().transformer.encoder.layers:
        block.dropout.train()
    assert not same()


# Losses and the classifier


def test_loss_with_gradient_accumulation(make_model):
    """num_items_in_batch divides the summed loss, so the losses of two halves add up to that of the batch."""
    model, ids = make_model(), some_ids(rows=4)
    labels = ids.clone()
    labels[0, :5] = -100
    items = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        whole = model(input_ids=ids, labels=labels).loss
        halves = [
            model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=items).loss for rows in ([0, 1], [2, 3])
        ]
    torch.testing.assert_close(sum(halves), whole)


def test_chunked_loss_matches_the_full_loss(make_model, monkeypatch):
    """Chunks that end inside a row change neither loss nor gradients."""
    model, ids, results = make_model(), some_ids(rows=3), []
    labels = ids.clone()
    labels[1, 4:9] = -100
    for chunk in (1024, 5):
        monkeypatch.setattr(modeling_chatglm, "LOSS_CHUNK", chunk)
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), model.transformer.output_layer.weight.grad))
    torch.testing.assert_close(*results)
    whole = logits(model, ids)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(results[0][0], torch.nn.functional.cross_entropy(whole, labels[:, 1:].flatten()))


def test_classifier_reads_the_last_real_token(make_model, padded_batch):
    """With left or right padding, the logits are those of the row alone."""
    ids, mask, rows = padded_batch
    model = make_model(cls=ChatGLMForSequenceClassification, num_labels=3)
    with torch.no_grad():
        left = model(input_ids=ids, attention_mask=mask).logits
        ids_right, mask_right = (
            torch.stack([row.roll(int(n)) for row, n in zip(tensor, mask.sum(1))]) for tensor in (ids, mask)
        )
        right = model(input_ids=ids_right, attention_mask=mask_right).logits
        alone = torch.cat([model(input_ids=row).logits for row in rows])
    torch.testing.assert_close(left, alone, **CLOSE)
    torch.testing.assert_close(right, alone, **CLOSE)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 2]), torch.tensor([[1.0, 0, 1], [0, 0, 1]])], ids=["single_label", "multi_label"]
)
def test_classifier_loss_depends_on_the_labels(make_model, labels):
    """Class indices use cross entropy, float rows binary cross entropy; one call does not affect the next."""
    model = make_model(cls=ChatGLMForSequenceClassification, num_labels=3)
    out = model(input_ids=some_ids(), labels=labels)
    if labels.dim() == 1:
        want = torch.nn.functional.cross_entropy(out.logits, labels)
    else:
        want = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels)
    torch.testing.assert_close(out.loss, want)
    assert model.config.problem_type is None


def test_regression_accepts_both_label_shapes(make_model):
    """num_labels=1: labels [B] and [B, 1] give the same squared error."""
    model = make_model(cls=ChatGLMForSequenceClassification, num_labels=1)
    labels = torch.tensor([0.5, -2.0])
    losses = [model(input_ids=some_ids(), labels=shape).loss for shape in (labels, labels[:, None])]
    torch.testing.assert_close(*losses)
