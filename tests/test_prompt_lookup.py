"""Drafts by prompt lookup: the ids of greedy decoding in fewer steps, and no draft where nothing repeats."""

import contextlib

import pytest
import torch
from chatglm2.generation_chatglm import PromptLookup
from chatglm2.transformers_compat import NEEDED, VERSION, DynamicCache
from conftest import ANSWERS
from model_helpers import CLOSE
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

needs_lookup = pytest.mark.needs_transformers("4.42", "prompt lookup with any cache")
LOOKUP = {"prompt_lookup_num_tokens": 10}


def answer_with(lookup, prompt, answer):
    """[length of each step's draft], where the model would write `answer`."""
    ids, lengths = list(prompt), []
    while len(ids) < len(prompt) + len(answer):
        drafted = lookup.get_candidates(torch.tensor([ids]))[0][0, len(ids) :].tolist()
        rest = answer[len(ids) - len(prompt) :]
        right = next((i for i, (a, b) in enumerate(zip(drafted, rest)) if a != b), min(len(drafted), len(rest)))
        lengths.append(len(drafted))
        ids += rest[: right + 1]
    return lengths


def test_copies_are_drafted():
    """A hundred tokens of the prompt come in 18 steps; no draft is longer than asked for."""
    prompt = list(range(100))
    lengths = answer_with(PromptLookup(10, 1000, set()), prompt, prompt)
    assert len(lengths) < 20 and max(lengths) == 10 and lengths[:3] == [0, 0, 0]


def test_nothing_is_drafted_without_repetitions():
    """Neither for new tokens, nor where three known tokens are followed by another each time."""
    assert set(answer_with(PromptLookup(10, 1000, set()), range(100), list(range(100, 300)))) == {0}
    misleading = [token for i in range(50) for token in (1, 2, 3, 10 + i)]
    lengths = answer_with(PromptLookup(10, 1000, set()), misleading[:100], misleading[100:])
    assert sum(lengths) < 3


def test_drafts_end_before_the_end():
    """Before an eos token, and where max_length leaves room for one more token than the draft."""
    prompt = [*range(20), 99, *range(30, 40)]
    lookup = PromptLookup(10, 1000, {99})
    answer_with(lookup, prompt, range(18))
    assert lookup.get_candidates(torch.tensor([[*prompt, *range(18)]]))[0][0, len(prompt) + 18 :].tolist() == [18, 19]
    lookup = PromptLookup(10, 52, set())
    answer_with(lookup, prompt, range(18))
    assert lookup.get_candidates(torch.tensor([[*prompt, *range(18)]]))[0].shape[1] == 51


class Script(LogitsProcessor):
    """Writes a pattern of eight tokens, with a slip now and then, whatever the model wants."""

    def __call__(self, input_ids, scores):
        place = input_ids.shape[1]
        scores = scores.clone()
        scores[:, 10 + place % 8 if place % 19 else 50 + place] = 1e4
        return scores


@pytest.fixture
def repetitive(make_model):
    """A random model, a prompt, settings by which the answer repeats itself, and a list of the steps' lengths."""
    model, steps = make_model(), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: steps.append(output.shape[1]))
    settings = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None}
    settings["logits_processor"] = LogitsProcessorList([Script()])
    return model, torch.tensor([[7, 8, 9, 5]]), settings, steps


@needs_lookup
def test_same_ids_in_fewer_steps(repetitive):
    """generate and stream_generate; the stream yields several tokens a step and ends at max_new_tokens."""
    model, ids, settings, steps = repetitive
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert len(steps) == 60
    steps.clear()
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **LOOKUP), plain)
    assert len(steps) < 40
    for new in (60, 37):
        outputs = list(model.stream_generate(ids, **{**settings, "max_new_tokens": new}, **LOOKUP))
        assert torch.equal(outputs[-1], plain[:, : 4 + new])
        assert len(outputs) < 0.8 * new
        assert all(torch.equal(output, plain[:, : output.shape[1]]) for output in outputs)


@needs_lookup
@pytest.mark.parametrize("whose", ["the caller's", "the model's"])
def test_a_generation_config_asks_for_drafts(repetitive, whose):
    model, ids, settings, steps = repetitive
    plain = model.generate(ids, **settings)
    steps.clear()
    asking = GenerationConfig(pad_token_id=0, **LOOKUP)
    if whose == "the model's":
        model.generation_config = asking
    else:
        settings["generation_config"] = asking
    assert torch.equal(model.generate(ids, **settings), plain)
    assert len(steps) < 40


@needs_lookup
def test_an_interrupted_stream_leaves_no_draft_in_the_cache(repetitive):
    """Wherever it is closed: the cache holds the keys of what was yielded, but for the newest token."""
    model, ids, settings, _ = repetitive
    refused = 0
    for number in range(1, 32):
        cache = DynamicCache()
        with contextlib.closing(model.stream_generate(ids, past_key_values=cache, **settings, **LOOKUP)) as stream:
            for _ in range(number):
                so_far = next(stream)
            refused += cache.get_seq_length() > so_far.shape[1] - 1
        assert cache.get_seq_length() == so_far.shape[1] - 1
        wanted = DynamicCache()
        with torch.no_grad():
            model(so_far[:, :-1], past_key_values=wanted)
        for held, computed in zip(tensors(cache), tensors(wanted)):
            torch.testing.assert_close(held, computed, **CLOSE)
    assert refused  # some step ended with a refused draft


def tensors(cache):
    """The last layer's keys and values."""
    if hasattr(cache, "layers"):
        return cache.layers[-1].keys, cache.layers[-1].values
    return cache.key_cache[-1], cache.value_cache[-1]


@needs_lookup
def test_chat_answers_the_same(tiny_model, tokenizer):
    """chat and stream_chat, over two rounds with a cache; sampling takes drafts, too."""
    greedy = {"do_sample": False, "max_new_tokens": 30}
    rounds = []
    for drafts in ({}, LOOKUP):
        history, cache = [], None
        for query in ("你好", "谢谢", "你好"):
            answer = tiny_model.chat(tokenizer, query, history, **greedy, **drafts)[0]
            steps = tiny_model.stream_chat(
                tokenizer, query, history, cache, return_past_key_values=True, **greedy, **drafts
            )
            *_, (streamed, history, cache) = steps
            rounds.append((answer, streamed, cache.get_seq_length()))
    assert rounds[:3] == rounds[3:] and rounds[0][:2] == (ANSWERS["你好"],) * 2
    assert tiny_model.chat(tokenizer, "你好", temperature=1e-3, **LOOKUP)[0] == ANSWERS["你好"]


@pytest.mark.skipif(VERSION >= (4, 42), reason="this release has them all")
@pytest.mark.parametrize(("name", "since"), NEEDED.items(), ids=list(NEEDED))
def test_older_releases_refuse_by_name(make_model, name, since):
    """Prompt lookup, drafts by another model, and contrastive search."""
    model, ids = make_model(), torch.tensor([[7, 8, 9]])
    given = {"assistant_model": model, "penalty_alpha": 0.6, **LOOKUP}[name]
    if VERSION >= since:
        assert model.generate(ids, **{name: given}, max_new_tokens=3, do_sample=False).shape == (1, 6)
        return
    message = f"{name} needs transformers {since[0]}.{since[1]}: upgrade"
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **{name: given})
    if name != "assistant_model":
        with pytest.raises(ValueError, match=message):
            model.generate(ids, generation_config=GenerationConfig(**{name: given}))
