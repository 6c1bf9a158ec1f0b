"""The network's own consistency: every way of computing the same thing gives the same thing."""

import copy
import pickle

import pytest
import torch
from chatglm2 import modeling_chatglm
from chatglm2.modeling_chatglm import ChatGLMForSequenceClassification, ChatGLMModel, rotary_cos_sin, rotate
from chatglm2.transformers_compat import DynamicCache
from transformers import GenerationConfig

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def some_ids(rows=2, length=12, seed=3):
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


# Batches, caches, chunks


def test_left_padded_rows_equal_rows_alone(make_model, padded_batch):
    """Padding is invisible: each row's logits, and its greedy continuation, are those of the row by itself."""
    model, (ids, mask, rows) = make_model(), padded_batch
    together = logits(model, ids, attention_mask=mask)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for i, row in enumerate(rows):
        length = row.shape[1]
        torch.testing.assert_close(together[i, -length:], logits(model, row)[0], **CLOSE)
        alone = model.generate(row, max_new_tokens=6, do_sample=False)
        assert generated[i, 9:].tolist()[: alone.shape[1] - length] == alone[0, length:].tolist()


def test_position_ids_of_the_tokenizer_change_nothing(make_model, padded_batch):
    """`generate` given the tokenizer's position_ids equals `generate` that derives them, at every step."""
    model, (ids, mask, _) = make_model(), padded_batch
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, position_ids=positions, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_steps_equal_one_pass(make_model, padded_batch, attention):
    """One token at a time through the cache gives the logits of the whole, positions derived from mask and cache."""
    model, (ids, mask, _) = make_model(attention=attention), padded_batch
    whole = logits(model, ids, attention_mask=mask, use_cache=False)
    cache, steps = DynamicCache(), []
    for t in range(ids.shape[1]):
        steps.append(logits(model, ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache))
    steps = torch.cat(steps, dim=1)
    torch.testing.assert_close(steps[mask.bool()], whole[mask.bool()], **CLOSE)


def test_positions_go_on_from_the_cache_without_a_mask(make_model):
    """Omitted position_ids and mask continue behind the cache; the original restarted at 0."""
    model, ids, cache = make_model(), some_ids(), DynamicCache()
    chunks = [logits(model, part, past_key_values=cache) for part in ids.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), logits(model, ids), **CLOSE)


@pytest.mark.needs_transformers("4.51", "prefill_chunk_size")
def test_chunked_prefill_equals_whole(make_model):
    """`generate(prefill_chunk_size=...)` gives the same ids."""
    model, ids = make_model(), some_ids(length=23)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    whole = model.generate(ids, **settings)
    chunked = model.generate(ids, prefill_chunk_size=5, past_key_values=DynamicCache(), **settings)  # 5.0.0 makes none
    assert torch.equal(chunked, whole)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_long_prompt_in_chunks(make_model, padded):
    """The last scores of a prompt of 8,192 tokens, whole and 1,024 at a time, left padded too."""
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


@pytest.mark.needs_transformers("4.42", "static caches that any model can use")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_static_cache_equals_dynamic(make_model, padded_batch, attention):
    """`cache_implementation="static"` gives the ids of the dynamic cache, in a padded batch."""
    model, (ids, mask, _) = make_model(attention=attention), padded_batch
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    quick = {"disable_compile": True} if hasattr(GenerationConfig(), "disable_compile") else {}
    static = model.generate(ids, cache_implementation="static", **quick, **settings)
    assert torch.equal(static, model.generate(ids, **settings))


def test_sdpa_equals_eager(make_model, padded_batch):
    """The fused attention and the reference give the same logits, padded or not, and at a single new token."""
    ids, mask, _ = padded_batch
    fused, plain = make_model(), make_model(attention="eager")
    torch.testing.assert_close(
        logits(fused, ids, attention_mask=mask)[mask.bool()],
        logits(plain, ids, attention_mask=mask)[mask.bool()],
        **CLOSE,
    )
    torch.testing.assert_close(logits(fused, some_ids()), logits(plain, some_ids()), **CLOSE)
    torch.testing.assert_close(logits(fused, some_ids(length=1)), logits(plain, some_ids(length=1)), **CLOSE)


@pytest.mark.needs_transformers("4.53", "flex attention for models outside of the library")
def test_flex_equals_eager(make_model):
    """`attn_implementation="flex_attention"` goes through transformers' attention interface."""
    ids = some_ids(rows=1, length=9)
    flex, eager = make_model(attention="flex_attention"), make_model(attention="eager")
    with torch.compiler.set_stance("force_eager"):  # its compilation takes a minute and proves nothing here
        torch.testing.assert_close(logits(flex, ids), logits(eager, ids), **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_four_dimensional_mask_reaches_the_attention(make_model, attention):
    """A ready boolean mask [B, 1, T, S] is used as it is: forbidding the first token equals padding it."""
    model, ids = make_model(attention=attention), some_ids(rows=1, length=6)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    allowed[1:, 0] = False
    positions = torch.tensor([[0, 0, 1, 2, 3, 4]])
    by_hand = logits(model, ids, attention_mask=allowed[None, None], position_ids=positions)
    padded = logits(model, ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    torch.testing.assert_close(by_hand[:, 1:], padded[:, 1:], **CLOSE)


# generate, untouched


def test_beam_scores_agree_with_a_recomputation(make_model):
    """A beam's score is the log probability of its new tokens, recomputed in one pass."""
    model, ids = make_model(), some_ids(rows=2, length=5)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,  # else a mean, over the new tokens or, once, over the prompt, too
        max_new_tokens=5,
        eos_token_id=None,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = logits(model, out.sequences).log_softmax(-1)[:, 4:-1]
    new = out.sequences[:, 5:]
    recomputed = scores.gather(-1, new[..., None]).squeeze(-1).sum(-1)
    torch.testing.assert_close(out.sequences_scores, recomputed, **CLOSE)


@pytest.mark.needs_transformers("4.39", "assisted decoding with a cache that is no tuple")
def test_assisted_decoding_equals_greedy(make_model):
    """Prompt lookup and a smaller assistant propose tokens; greedy's ids come out."""
    model, assistant = make_model(), make_model(num_layers=1, seed=1)
    ids = some_ids(rows=1, length=8).repeat(1, 2)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    greedy = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), greedy)


@pytest.mark.needs_transformers("4.42", "prompt lookup with any cache")
def test_prompt_lookup_equals_greedy(make_model):
    """`prompt_lookup_num_tokens` gives greedy's ids."""
    model, ids = make_model(), some_ids(rows=1, length=8).repeat(1, 2)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **settings), model.generate(ids, **settings))


def test_generate_from_embeddings(make_model):
    """inputs_embeds give the logits, and the greedy continuation, of the ids they stand for."""
    model, ids = make_model(), some_ids()
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, logits(model, ids), **CLOSE)
    new = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(new[:, -5:], model.generate(ids, max_new_tokens=5, do_sample=False)[:, -5:])


def test_step_compiles_without_a_graph_break(make_model):
    """torch's own report counts no break, and fullgraph=True traces prefill and decode: nothing leaves the graph."""
    torch._dynamo.reset()
    model, ids = make_model(), some_ids()
    report = torch._dynamo.explain(model)(input_ids=ids)
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        cache = DynamicCache()
        prefill = compiled(input_ids=ids[:, :-1], past_key_values=cache).logits
        step = compiled(input_ids=ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((prefill, step), dim=1), logits(model, ids), **CLOSE)


@pytest.mark.needs_transformers("4.57", "a static cache that counts its own tokens while compiled")
@pytest.mark.parametrize("bits", [0, 4])
def test_static_decoding_compiles_once(make_model, bits):
    """generate(cache_implementation="static") compiles one whole graph, and the growing answer never another one."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, ids, graphs = make_model().quantize(bits), some_ids(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    compiled = model.generate(ids, cache_implementation="static", compile_config=compile_config, **settings)
    assert len(graphs) == 1
    assert torch.equal(compiled, model.generate(ids, **settings))


@torch.no_grad()
def test_prompt_and_step_ask_no_tensor_for_a_value(make_model):
    """On the meta device `.item()`, `.tolist()` and `if tensor` raise: no GPU waits for the host within forward."""
    model, cache = make_model().to("meta"), DynamicCache()
    for length in (5, 1, 1):
        ids = torch.zeros(2, length, dtype=torch.long, device="meta")
        scores = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        assert scores.shape == (2, length, model.config.padded_vocab_size)
    assert cache.get_seq_length() == 7


@torch.no_grad()
@pytest.mark.needs_transformers("5.23.0", "a generate that drops masks which say nothing")
def test_a_step_behind_padding_asks_no_tensor_for_a_value(make_model, monkeypatch):
    """generate asks the mask of a padded batch before its first step and in the prompt, and never again."""
    model, asked, ask = make_model(), [], torch.Tensor.__bool__
    ids = some_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    steps = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: asked.append(len(steps)) or ask(tensor))
    forward = model.transformer.forward

    def counted(*args, **kwargs):
        steps.append(None)
        asked.clear()
        outputs = forward(*args, **kwargs)
        assert len(steps) == 1 or not asked, "forward asked a tensor for its value"
        return outputs

    monkeypatch.setattr(model.transformer, "forward", counted)
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert len(steps) == 6
    monkeypatch.undo()
    alone = model.generate(ids[:1, 3:], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(padded[:1, 3:], alone)


# What forward returns


def test_logits_to_keep_scores_the_last_positions(make_model):
    """logits_to_keep=n gives the last n columns, an index tensor gives its columns."""
    model, ids = make_model(), some_ids()
    whole = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=1), whole[:, -1:], **CLOSE)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=torch.tensor([2, 5])), whole[:, [2, 5]], **CLOSE)


def test_hidden_states_and_attentions(make_model):
    """num_layers + 1 hidden states [B, T, C], the last behind the final norm; eager weights [B, H, T, S] sum to 1."""
    model, ids = make_model(attention="eager"), some_ids()
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
        core = model.transformer(input_ids=ids)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 12, 64)] * 4
    assert torch.equal(out.hidden_states[-1], core.last_hidden_state)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 12, 12)] * 3
    torch.testing.assert_close(out.attentions[1].sum(-1), torch.ones(2, 4, 12), **CLOSE)
    assert out.attentions[1].triu(1).abs().max() == 0


def test_attentions_of_a_fused_kernel_are_refused(make_model):
    """output_attentions with sdpa names the cure."""
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        make_model()(input_ids=some_ids(), output_attentions=True)


def test_cache_holds_groups_not_heads(make_model):
    """The cache keeps (B, G, S, D): two groups, not four heads."""
    cache = DynamicCache()
    logits(make_model(), some_ids(), past_key_values=cache)
    key = cache.layers[0].keys if hasattr(cache, "layers") else cache.key_cache[0]
    assert key.shape == (2, 2, 12, 16)


# Rotary embedding and precision


def test_rotation_turns_pairs_and_passes_half(make_config):
    """Pair i of position p turns by p * 10000^(-2i / R); position 0 and the second half stay as they are."""
    config = make_config()
    x = torch.randn(1, 3, 2, 16)
    turned = rotate(x, *rotary_cos_sin(config, torch.tensor([[0, 1, 7]])))
    assert torch.equal(turned[:, 0], x[:, 0]) and torch.equal(turned[..., 8:], x[..., 8:])
    angle = torch.tensor(7 * 10000 ** (-2 / 8), dtype=torch.float32)
    even, odd = x[0, 2, 1, 2], x[0, 2, 1, 3]
    torch.testing.assert_close(turned[0, 2, 1, 2], even * angle.cos() - odd * angle.sin(), **CLOSE)
    torch.testing.assert_close(turned[0, 2, 1, 3], odd * angle.cos() + even * angle.sin(), **CLOSE)


def test_rope_ratio_has_both_meanings(make_config):
    """ "linear" divides the positions, "base" multiplies the base 10000."""
    positions = torch.tensor([[0, 4, 8]])
    plain = rotary_cos_sin(make_config(), positions // 4)
    linear = rotary_cos_sin(make_config(rope_ratio=4), positions)
    torch.testing.assert_close(linear, plain)
    cos, _ = rotary_cos_sin(make_config(rope_ratio=4, rope_ratio_type="base"), positions)
    frequencies = torch.tensor([40000.0 ** (-2 * i / 8) for i in range(4)])
    torch.testing.assert_close(cos[0, 1, 0], (4 * frequencies).cos())


@pytest.mark.parametrize("kind", ["linear", "base"])
def test_positions_stay_distinct_to_128k(make_config, kind):
    """With rope_ratio 4 the fastest pair's angle grows by the same step up to position 131,072, finite everywhere."""
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
def test_the_carried_model_at_128k(tiny_model, tokenizer):
    """With rope_ratio 4 its scores far out are finite, and those of the same text at the beginning."""
    model = copy.deepcopy(tiny_model)
    model.config.rope_ratio = 4
    ids = tokenizer(tokenizer.build_prompt("你好"), return_tensors="pt")["input_ids"]
    near = torch.arange(ids.shape[1])[None]
    far = logits(model, ids, position_ids=near + 131072 - ids.shape[1], use_cache=False)
    torch.testing.assert_close(far, logits(model, ids, position_ids=near, use_cache=False), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 2000, 8000, 30000])
def test_half_precision_agrees_at_every_position(tiny_model, tokenizer, dtype, offset):
    """The half precision argmax is float32's at more than 95% of the positions, however far out they are.

    The original turned keys and queries in half precision: below 50% from position 3000 on.
    """
    text = tokenizer.build_prompt("彩虹有哪些颜色", [("你好", "你好！"), ("Hello", "Hi there."), ("谢谢", "不客气。")])
    ids = tokenizer(text * 3, return_tensors="pt")["input_ids"]
    positions = torch.arange(ids.shape[1])[None] + offset
    wide = logits(tiny_model, ids, position_ids=positions, use_cache=False)
    half = logits(copy.deepcopy(tiny_model).to(dtype), ids, position_ids=positions, use_cache=False)
    assert (wide.argmax(-1) == half.argmax(-1)).float().mean() > 0.95


@pytest.mark.parametrize("rmsnorm", [True, False])
def test_fp32_residual_connection(make_model, rmsnorm):
    """The residual stream stays float32 between bfloat16 layers: closer to float32 than without."""
    ids = some_ids()
    wide = logits(make_model(rmsnorm=rmsnorm), ids)
    plain = logits(make_model(rmsnorm=rmsnorm).bfloat16(), ids)
    kept = logits(make_model(rmsnorm=rmsnorm, fp32_residual_connection=True).bfloat16(), ids)
    assert plain.dtype == kept.dtype == torch.bfloat16
    assert (kept - wide).norm() < (plain - wide).norm()


# Training


@pytest.mark.parametrize("changes", [{}, {"pre_seq_len": 5}], ids=["weights", "prefix"])
def test_gradient_checkpointing_changes_no_gradient(make_model, changes):
    """Blocks computed twice give the gradients of blocks computed once, the learned prefix's too."""
    ids, gradients = some_ids(), []
    for checkpointing in (False, True):
        model = make_model(**changes).train()
        if changes:
            model.transformer.prefix_encoder.dropout.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


def test_gradient_checkpointing_is_not_reentrant(make_model):
    """Only non-reentrant checkpointing gives a gradient when no input asks for one, as under LoRA."""
    model = make_model().train()
    model.requires_grad_(False)
    model.transformer.encoder.layers[0].self_attention.dense.weight.requires_grad_(True)
    model.gradient_checkpointing_enable()
    ids = some_ids()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert model.transformer.encoder.layers[0].self_attention.dense.weight.grad.abs().sum() > 0


def test_loss_over_accumulated_batches(make_model):
    """num_items_in_batch divides the sum, so that two halves add up to the whole."""
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


def test_loss_in_chunks_is_the_loss_of_the_whole(make_model, monkeypatch):
    """Chunks that end within a row change neither loss nor gradient."""
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


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_trains_alone_and_counts_for_nothing_else(make_model, projection):
    """P-Tuning v2: all else is frozen; cached steps equal one pass; generate goes on from its own cache."""
    model, ids = make_model(pre_seq_len=5, prefix_projection=projection), some_ids()
    assert all(p.requires_grad == ("prefix_encoder" in name) for name, p in model.named_parameters())
    whole, cache = logits(model, ids, use_cache=False), DynamicCache()
    mask = torch.ones_like(ids)
    steps = [
        logits(model, ids[:, t : t + 1], past_key_values=cache, attention_mask=mask[:, : t + 1]) for t in range(12)
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **CLOSE)
    assert cache.get_seq_length() == 12 + 5
    greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)[:, -5:], greedy[:, -5:])
    slow = ids
    for _ in range(5):
        slow = torch.cat((slow, logits(model, slow, use_cache=False)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(greedy, slow)
    beams = model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape == (2, 16)


@pytest.mark.needs_transformers("5.0", "static caches that count their own tokens, and chunks")
def test_what_does_not_go_with_a_prefix_is_refused(make_model):
    """A static cache has no room for the prefix; chunked prefill is right where a release allows it, or refused."""
    model, ids = make_model(pre_seq_len=5), some_ids()
    with pytest.raises(ValueError, match="no room for the prefix of pre_seq_len=5"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    settings = {"max_new_tokens": 3, "do_sample": False}
    try:
        chunked = model.generate(ids, prefill_chunk_size=4, past_key_values=DynamicCache(), **settings)
    except ValueError as error:
        assert "prefill_chunk_size does not work with a P-Tuning prefix" in str(error)
    else:
        assert torch.equal(chunked, model.generate(ids, **settings))


def test_classifier_reads_the_last_real_token(make_model, padded_batch):
    """Left or right padding: the scores are those of the row alone."""
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
def test_classifier_loss_follows_the_labels(make_model, labels):
    """Class numbers give cross entropy, float rows give binary cross entropy; the next call may use the other."""
    model = make_model(cls=ChatGLMForSequenceClassification, num_labels=3)
    out = model(input_ids=some_ids(), labels=labels)
    if labels.dim() == 1:
        want = torch.nn.functional.cross_entropy(out.logits, labels)
    else:
        want = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels)
    torch.testing.assert_close(out.loss, want)
    assert model.config.problem_type is None


def test_regression_compares_row_by_row(make_model):
    """num_labels=1: labels [B] and [B, 1] give the same squared error."""
    model = make_model(cls=ChatGLMForSequenceClassification, num_labels=1)
    labels = torch.tensor([0.5, -2.0])
    losses = [model(input_ids=some_ids(), labels=shape).loss for shape in (labels, labels[:, None])]
    torch.testing.assert_close(*losses)


# The ecosystem's handles


@pytest.mark.needs_transformers("4.54", "set_attn_implementation")
def test_attention_can_be_switched(make_model):
    """set_attn_implementation takes effect at the next call."""
    model, ids = make_model(), some_ids()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert len(model(input_ids=ids, output_attentions=True).attentions) == 3


def test_embeddings_can_be_read_replaced_and_resized(make_model):
    """Accessors, and resize_token_embeddings: old rows stay, config and output layer follow."""
    model, ids = make_model(), some_ids()
    before = logits(model, ids)
    assert model.get_input_embeddings() is model.transformer.embedding.word_embeddings
    assert model.get_output_embeddings() is model.transformer.output_layer
    model.resize_token_embeddings(330)
    after = logits(model, ids)
    assert after.shape[-1] == 330 and model.config.vocab_size == model.config.padded_vocab_size == 330
    torch.testing.assert_close(after[..., :320], before, **CLOSE)


def test_deepcopy_and_pickle(make_model):
    """Copies compute the same and share nothing."""
    model, ids = make_model(), some_ids()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), logits(model, ids))
        assert other.transformer.output_layer.weight.data_ptr() != model.transformer.output_layer.weight.data_ptr()


def test_layers_may_lie_on_different_devices(make_model, tmp_path):
    """accelerate keeps blocks whole and moves what it offloads to disk: the logits stay."""
    from accelerate import cpu_offload, disk_offload

    ids = some_ids()
    want = logits(make_model(), ids)
    assert torch.equal(logits(cpu_offload(make_model(), torch.device("cpu")), ids), want)
    assert torch.equal(logits(disk_offload(make_model(), str(tmp_path), torch.device("cpu")), ids), want)


def test_standard_config_names(make_config):
    """Tools read transformers' names; they are the released values under another name."""
    config = make_config()
    assert config.num_hidden_layers == 3 and config.num_key_value_heads == 2 and config.head_dim == 16
    assert config.intermediate_size == 96 and config.max_position_embeddings == 256 and config.vocab_size == 320
    assert make_config(multi_query_attention=False).num_key_value_heads == 4
    config.num_hidden_layers = 2
    assert config.num_layers == 2 and config.to_dict()["num_layers"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_query_group_num": 3}, "num_attention_heads=4 is not a multiple of multi_query_group_num=3"),
        ({"kv_channels": 6}, "kv_channels=6 is not a multiple of 4"),
        ({"rope_ratio_type": "ntk"}, "rope_ratio_type='ntk' is unknown"),
        ({"rope_ratio": 0}, "rope_ratio=0 must be above 0"),
        ({"quantization_bit": 3}, "quantization_bit=3 is unknown"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ],
)
def test_impossible_configurations_are_refused(make_config, changes, message):
    """The message names the value, the limit and the cure."""
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_bad_inputs_are_named(make_model):
    """Ids out of range, a mask of the wrong length, both or neither kind of input: one clear message each."""
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


def test_model_without_head_is_the_same_network(make_model):
    """ChatGLMModel, the body, computes the hidden states of the model around it."""
    model, ids = make_model(), some_ids()
    body = make_model(cls=ChatGLMModel)
    body.load_state_dict(model.transformer.state_dict())
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


def test_dropout_acts_where_its_module_trains(make_model):
    """In training, and where a caller trains the dropout modules alone, to sample answers; never in evaluation."""
    model, ids = make_model(hidden_dropout=0.5), torch.tensor([[7, 8, 9]])

    def same():
        with torch.no_grad():
            return torch.equal(model(ids).logits, model(ids).logits)

    assert same() and not (model.train() and same())
    for block in model.eval().transformer.encoder.layers:
        block.dropout.train()
    assert not same()
