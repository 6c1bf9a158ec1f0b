"""generate stays within seq_length, ends at the config's eos, and makes an error of damaged weights, not an answer."""

import json

import pytest
import torch
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from model_helpers import Forbid, some_ids
from transformers import GenerationConfig


@pytest.fixture
def model(make_model):
    """One that never ends by itself, with room for 40 tokens."""
    model = make_model(seq_length=40)
    model.generation_config.eos_token_id = None
    return model


# ---- seq_length -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inputs", "input_ids", "inputs_embeds"])
def test_more_new_tokens_than_fit_are_rejected_before_the_work(model, name):
    ids = some_ids(2, 30)
    prompt = {name: model.get_input_embeddings()(ids) if name == "inputs_embeds" else ids}
    model.transformer.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match="30 tokens and max_new_tokens=11 exceed seq_length=40.* to 10"):
        model.generate(**prompt, max_new_tokens=11)
    with pytest.raises(ValueError, match="40 tokens and max_new_tokens=1 exceed seq_length=40. Shorten the prompt."):
        model.generate(some_ids(1, 40), max_length=100)


@pytest.mark.parametrize("limits", [{"max_new_tokens": 1024}, {"max_length": 10_000}], ids=str)
@pytest.mark.parametrize("whose", ["the caller's", "the model's"])
def test_limits_of_a_generation_config_end_at_seq_length(model, limits, whose):
    """Servers and pipelines set their default there, whatever the prompt; it is not modified."""
    settings, given = GenerationConfig(do_sample=False, **limits), {}
    if whose == "the model's":
        model.generation_config = settings
    else:
        given["generation_config"] = settings
    assert model.generate(some_ids(2, 30), **given).shape == (2, 40)
    *_, last = model.stream_generate(some_ids(2, 30), **given)
    assert last.shape == (2, 40)
    assert {name: getattr(settings, name) for name in limits} == limits


def test_chat_ends_there_too(make_model, tokenizer):
    model = make_model(padded_vocab_size=1664, seq_length=40)
    settings = GenerationConfig(do_sample=False, max_new_tokens=1024)
    _, ((_, answer),) = model.chat(tokenizer, "你好", generation_config=settings)
    *_, (streamed, _) = model.stream_chat(tokenizer, "你好", generation_config=settings)
    assert streamed == answer


def test_what_fits_exactly_is_generated(model):
    assert model.generate(some_ids(2, 30), max_new_tokens=10, do_sample=False).shape == (2, 40)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_larger_max_length_ends_at_seq_length(model, num_beams):
    """max_length is a limit, and seq_length a lower one; max_new_tokens asks for tokens."""
    ids = some_ids(2, 30)
    assert model.generate(ids, max_length=10_000, num_beams=num_beams, do_sample=False).shape == (2, 40)
    assert model.generate(ids, max_length=35, do_sample=False).shape == (2, 35)
    assert model.generate(ids, do_sample=False).shape == (2, 40)  # transformers' default would give 20 tokens more
    *_, last = model.stream_generate(ids, max_length=10_000, do_sample=False)
    assert last.shape == (2, 40)


@pytest.mark.needs_transformers("4.40", "assisted decoding with a cache that is no tuple")
@pytest.mark.parametrize("room", [20, 40])
def test_assistant_with_less_room_drafts_beyond_it(make_model, model, room):
    """Its drafts may be bad there, but they are no answers."""
    assistant = make_model(seq_length=room, num_layers=1)
    ids = some_ids(1, 18)
    want = model.generate(ids, max_new_tokens=22, do_sample=False)
    got = model.generate(ids, max_new_tokens=22, do_sample=False, assistant_model=assistant)
    assert torch.equal(got, want) and got.shape == (1, 40)


# ---- eos ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "do_sample": True}, {"eos_token_id": [7, 9]}], ids=str)
def test_generation_config_without_eos(make_model, tmp_path, settings):
    """generation_config.json says how to sample and forgets eos: that of config.json ends the answer."""
    make_model(eos_token_id=5, pad_token_id=3).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == settings.get("eos_token_id", 5)
    assert model.generation_config.pad_token_id == 3
    if "eos_token_id" not in settings:
        others = [i for i in range(320) if i != 5]
        ids = model.generate(some_ids(1, 4), logits_processor=[Forbid(others)], max_new_tokens=9)
        assert ids[0, 4:].tolist() == [5]


# ---- nan ------------------------------------------------------------------------------------------------------------

DAMAGED = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"


@pytest.fixture(params=[float("nan"), float("inf")])
def damaged(make_model, request):
    model = make_model(padded_vocab_size=1664)
    with torch.no_grad():
        model.get_parameter(DAMAGED)[3, 5] = request.param
    return model


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}], ids=str
)
def test_damaged_weights_are_named(damaged, tokenizer, options):
    """chat, streams and generate: a token of noise, or none, would look like an answer."""
    message = f"scores are all nan: {DAMAGED} contain nan or inf. The checkpoint is damaged"
    with pytest.raises(ValueError, match=message):
        damaged.chat(tokenizer, "你好", max_new_tokens=4, **options)
    with pytest.raises(ValueError, match=message):
        damaged.generate(some_ids(2, 5), max_new_tokens=4, **options)
    if "num_beams" not in options:
        with pytest.raises(ValueError, match=message):
            list(damaged.stream_chat(tokenizer, "你好", max_new_tokens=4, **options))


def test_damage_in_the_middle_of_an_answer(make_model):
    """The embedding of the first answered token is nan: found at the end, though the first step was good."""
    model, ids = make_model(), some_ids(1, 5)
    first = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item()
    assert first not in ids
    with torch.no_grad():
        model.get_input_embeddings().weight[first] = float("nan")
    model.generate(ids, max_new_tokens=1, do_sample=False)
    with pytest.raises(ValueError, match="word_embeddings.weight contain nan or inf"):
        model.generate(ids, max_new_tokens=3, do_sample=False)


def test_one_damaged_row_of_a_batch(make_model):
    """The others are right, but nobody could tell which."""
    model, ids = make_model(), some_ids(3, 5)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = float("nan")
    ids[1, 2] = 2
    with pytest.raises(ValueError, match="word_embeddings.weight contain nan or inf"):
        model.generate(ids, max_new_tokens=3, do_sample=False)


def test_evaluation_of_damaged_weights(damaged, tokenizer):
    from evaluate_ceval import Judge, Question

    with pytest.raises(ValueError, match=DAMAGED):
        Judge(damaged, tokenizer).letters([Question("0", "你好", "A", "here")])
