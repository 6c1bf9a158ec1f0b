"""prefix_chatglm: P-Tuning v2 in training, in generation and in chat."""

import pytest
import torch
from chatglm2.transformers_compat import DynamicCache
from model_helpers import CLOSE, GREEDY, logits, some_ids


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_training_and_generation(make_model, projection):
    """Only the prefix trains; cached steps match one pass; generate works with and without beams and embeddings."""
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
def test_prefix_rejects_static_caches_and_chunked_prefill(make_model):
    """A static cache is rejected; chunked prefill is correct if the release supports it, else rejected."""
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


def test_prefix_works_with_a_chat_cache(make_model, tokenizer):
    """In rounds with a cache, the prefix counts neither as tokens nor as positions."""
    model = make_model(padded_vocab_size=1664, pre_seq_len=4)
    model.generation_config.eos_token_id = None
    ids = model.build_inputs(tokenizer, "你好")["input_ids"]
    *_, (text, history, cache) = model.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    *_, whole = model.stream_generate(ids, **GREEDY)
    *_, (again, _, cache) = model.stream_chat(tokenizer, "再见", history, cache, return_past_key_values=True, **GREEDY)
    turn = model.build_stream_inputs(tokenizer, "再见", history)["input_ids"]
    fed = torch.cat((whole[:, :-1], turn), dim=1)
    *_, want = model.stream_generate(fed, attention_mask=torch.ones_like(fed), **GREEDY)
    response = model.process_response(
        tokenizer.decode(tokenizer.without_half_character(want[0, fed.shape[1] :].tolist()))
    )
    assert again == response
