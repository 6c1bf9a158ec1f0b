"""attention_chatglm: the attention functions agree with each other, and the causal mask with its definition."""

import pytest
import torch
from chatglm2 import attention_chatglm, transformers_compat
from chatglm2.transformers_compat import DynamicCache
from model_helpers import CLOSE, logits, some_ids


def test_sdpa_matches_eager(make_model, padded_batch):
    """sdpa and eager give the same logits, with and without padding, and for a single new token."""
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
def test_flex_attention_matches_eager(make_model):
    """`attn_implementation="flex_attention"` uses transformers' attention interface."""
    ids = some_ids(rows=1, length=9)
    flex, eager = make_model(attention="flex_attention"), make_model(attention="eager")
    with torch.compiler.set_stance("force_eager"):  # its compilation takes a minute and proves nothing here
        torch.testing.assert_close(logits(flex, ids), logits(eager, ids), **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_4d_mask_is_passed_through(make_model, attention):
    """A boolean mask [B, 1, T, S] is used unchanged: masking the first token is the same as padding it."""
    model, ids = make_model(attention=attention), some_ids(rows=1, length=6)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    allowed[1:, 0] = False
    positions = torch.tensor([[0, 0, 1, 2, 3, 4]])
    by_hand = logits(model, ids, attention_mask=allowed[None, None], position_ids=positions)
    padded = logits(model, ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    torch.testing.assert_close(by_hand[:, 1:], padded[:, 1:], **CLOSE)


@pytest.mark.needs_transformers("4.54", "set_attn_implementation")
def test_set_attn_implementation(make_model):
    """set_attn_implementation takes effect at the next call."""
    model, ids = make_model(), some_ids()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert len(model(input_ids=ids, output_attentions=True).attentions) == 3


@torch.no_grad()
@pytest.mark.parametrize("by_config", [False, True])
def test_sdpa_returns_attentions(make_model, by_config):
    """output_attentions, as an argument or in the config, computes the call by eager; the logits are sdpa's."""
    ids, mask = some_ids(), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    model, eager = make_model(), make_model(attention="eager")
    if by_config:
        model = make_model(output_attentions=True)
    out = model(input_ids=ids, attention_mask=mask, **({} if by_config else {"output_attentions": True}))
    want = eager(input_ids=ids, attention_mask=mask, output_attentions=True)
    assert len(out.attentions) == 3 and out.attentions[0].shape == (2, 4, 12, 12)
    assert all(torch.equal(a, b) for a, b in zip(out.attentions, want.attentions))
    plain = make_model()(input_ids=ids, attention_mask=mask)
    assert plain.attentions is None
    torch.testing.assert_close(out.logits[mask.bool()], plain.logits[mask.bool()], **CLOSE)
    steps = model.generate(
        ids, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True, eos_token_id=None
    )
    assert [step[2].shape[2:] for step in steps.attentions] == [(12, 12), (1, 13), (1, 14)]


@pytest.mark.needs_transformers("4.53", "attention functions of transformers with their masks")
def test_output_attentions_of_other_functions(make_model):
    """Fused functions of transformers have no weights: an error that names those that do."""
    with pytest.raises(
        ValueError, match="'flex_attention' does not compute attention weights. Load the model with 'sdpa'"
    ):
        make_model(attention="flex_attention")(input_ids=some_ids(), output_attentions=True)


def test_attentions_are_in_the_path(make_model):
    """The returned weights are those that the output is computed from: they get a gradient."""
    for attention in ("sdpa", "eager"):
        out = make_model(attention=attention)(input_ids=some_ids(), output_attentions=True)
        for weights in out.attentions:
            weights.retain_grad()
        out.logits[:, -1].sum().backward()
        assert all(weights.grad.abs().sum() > 0 for weights in out.attentions)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_are_independent(make_model, attention):
    """Without a cache, as in training. With one, positions may jump, as in the original."""
    model, ids = make_model(attention=attention), some_ids(rows=1, length=9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    torch.testing.assert_close(packed, apart)


@pytest.mark.parametrize("cached", [0, 4])
def test_causal_mask_matches_its_definition(make_config, cached):
    """A query attends to itself and to real tokens at or before its place."""
    config = make_config()
    config._attn_implementation = "sdpa"
    real = torch.ones(3, cached + 5, dtype=torch.long)
    real[0, :2], real[2, :] = 0, 0
    cache = DynamicCache()
    if cached:
        cache.update(torch.zeros(3, 2, cached, 16), torch.zeros(3, 2, cached, 16), 0)
    step = transformers_compat.cache_kwargs(cache, 5, torch.device("cpu"))
    mask = attention_chatglm.causal_mask(config, torch.zeros(3, 5, 1), real, cache, **step)
    for row in range(3):
        for query in range(5):
            place = cached + query
            seen = [k for k in range(cached + 5) if k == place or (k <= place and real[row, k])]
            assert mask[row, 0, query].nonzero().flatten().tolist() == seen


def test_layers_on_another_device_than_the_embedding(make_model):
    """The C code, chosen by the embedding's device, leaves tensors on other devices to torch."""
    from chatglm2.attention_chatglm import cpu_attention

    layer = make_model().transformer.encoder.layers[0].self_attention
    query, key = torch.empty(1, 4, 1, 16, device="meta"), torch.empty(1, 2, 5, 16, device="meta")
    output, _ = cpu_attention(layer, query, key, key, None, scaling=0.25)
    assert output.is_meta and output.shape == (1, 1, 4, 16)
