"""chat and stream_chat: histories, caches, limits, and text that never has to be retracted."""

import copy
import json
import warnings

import pytest
import torch
from chatglm2.transformers_compat import DynamicCache
from conftest import SHARED
from model_helpers import GREEDY, Forbid, Spell
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


@pytest.fixture
def chatty(make_model, tokenizer):
    """A random model with the tiny checkpoint's vocabulary that never generates an end token."""
    model = make_model(padded_vocab_size=1664, seq_length=512)
    model.generation_config.eos_token_id = None
    return model


def test_stream_chat_matches_chat(chatty, tokenizer):
    """Every step extends the previous one; the last one and its history are what `chat` returns."""
    history = [("你好", "你好！")]
    steps = list(chatty.stream_chat(tokenizer, "再见", history, **GREEDY))
    response, new_history = chatty.chat(tokenizer, "再见", history, **GREEDY)
    texts = [text for text, _ in steps]
    assert all(b.startswith(a.rstrip()) for a, b in zip(texts, texts[1:])) and texts[-1] == response
    assert steps[-1][1] == new_history == [("你好", "你好！"), ("再见", response)]
    assert history == [("你好", "你好！")]


def test_no_partial_characters_in_the_stream(make_model, tokenizer):
    """A model generates 😀龘 byte by byte; the stream shows only complete characters, and all of them."""
    want = "😀龘é!"
    spelled = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in want.encode()]

    spelled.insert(5, 1650)  # an id of the padded embedding, inside a character
    spell = Spell([*spelled, tokenizer.eos_token_id])
    model = make_model(padded_vocab_size=1664)
    texts = [text for text, _ in model.stream_chat(tokenizer, "x", logits_processor=[spell], do_sample=False)]
    assert texts == ["😀", "😀龘", "😀龘é", "😀龘é!"]
    cut, _ = model.chat(tokenizer, "x", logits_processor=[Spell(spelled)], do_sample=False, max_new_tokens=6)
    assert cut == "😀"


def test_no_partial_placeholders_in_the_stream(make_model, tokenizer):
    """[[训练时间]] becomes 2023年 at once: no step shows a part that a later one has to retract."""
    ids = tokenizer.encode("在[[训练时间]]前，[[训", add_special_tokens=False)
    spell, model = Spell([*ids, tokenizer.eos_token_id]), make_model(padded_vocab_size=1664)
    texts = [text for text, _ in model.stream_chat(tokenizer, "x", logits_processor=[spell], do_sample=False)]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:]))
    assert texts[0] == "在" and texts[-1] == "在2023年前，[[训" and not any("[[训练" in text for text in texts)


def test_cached_rounds_encode_only_new_tokens(chatty, tokenizer):
    """The next round feeds only its own tokens; the cache then holds both rounds."""
    fed = []
    chatty.transformer.embedding.word_embeddings.register_forward_hook(lambda m, i, o: fed.append(i[0].shape[1]))
    *_, (first, history, cache) = chatty.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    held = cache.get_seq_length()
    fed.clear()
    *_, (second, history, cache) = chatty.stream_chat(
        tokenizer, "再见", history, cache, return_past_key_values=True, **GREEDY
    )
    turn = chatty.build_stream_inputs(tokenizer, "再见", history[:1])["input_ids"].shape[1]
    assert fed[0] == turn and set(fed[1:]) <= {1}
    assert cache.get_seq_length() == held + turn + 11
    assert [q for q, _ in history] == ["你好", "再见"] and second


def test_continue_after_an_interrupted_round(chatty, tokenizer):
    """History and cache stay consistent after an interruption; the next round continues from them."""
    stream = chatty.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    for _ in range(3):
        text, history, cache = next(stream)
    stream.close()
    prompt = chatty.build_inputs(tokenizer, "你好")["input_ids"].shape[1]
    assert prompt <= cache.get_seq_length() < prompt + 12 and history == [("你好", text)]
    held = cache.get_seq_length()
    *_, (_, history, cache) = chatty.stream_chat(
        tokenizer, "再见", history, cache, return_past_key_values=True, **GREEDY
    )
    assert len(history) == 2 and cache.get_seq_length() > held


def test_empty_cache_is_filled_with_the_whole_prompt(chatty, tokenizer):
    """An empty cache from the caller gets the history and [gMASK] sop."""
    history, cache = [("你好", "你好！")], DynamicCache()
    *_, (text, _, same) = chatty.stream_chat(tokenizer, "再见", history, cache, return_past_key_values=True, **GREEDY)
    assert same is cache and text == chatty.chat(tokenizer, "再见", history, **GREEDY)[0]


def test_round_interrupted_before_its_first_text_leaves_the_cache_unchanged(chatty, tokenizer):
    """After Ctrl-C during prefill, cache and history still hold the same rounds."""
    *_, (_, history, cache) = chatty.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    held = cache.get_seq_length()

    class Interrupts(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(chatty.stream_chat(tokenizer, "再见", history, cache, logits_processor=[Interrupts()], **GREEDY))
    assert cache.get_seq_length() == held
    *_, (after, _) = chatty.stream_chat(tokenizer, "再见", history, cache, **GREEDY)
    assert after


def test_cache_works_inside_and_outside_inference_mode(chatty, tokenizer):
    """A cache created in torch.inference_mode() can be continued outside it, and the other way round."""
    with torch.inference_mode():
        *_, (_, history, cache) = chatty.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    *_, (_, history, cache) = chatty.stream_chat(
        tokenizer, "再见", history, cache, return_past_key_values=True, **GREEDY
    )
    with torch.inference_mode():
        *_, (text, _, _) = chatty.stream_chat(tokenizer, "x", history, cache, return_past_key_values=True, **GREEDY)
    assert text


def test_generation_config_replaces_the_settings(chatty, tokenizer):
    """generation_config determines sampling and length; chat adds nothing."""
    config = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0)
    want, _ = chatty.chat(tokenizer, "你好", **GREEDY)
    assert [chatty.chat(tokenizer, "你好", generation_config=config)[0] for _ in range(3)] == [want] * 3
    *_, (streamed, _) = chatty.stream_chat(tokenizer, "你好", generation_config=config)
    assert streamed == want


@pytest.mark.needs_transformers("4.42", "stop_strings for any tokenizer")
def test_stop_strings(tiny_model, tokenizer, recwarn):
    """stop_strings work without passing a tokenizer to generate, and without a warning."""
    assert tiny_model.chat(tokenizer, "你好", do_sample=False, stop_strings=["！"])[0] == "你好！"
    assert not [str(warning.message) for warning in recwarn if "ignores" in str(warning.message)]


def test_unsupported_chat_arguments_are_rejected(chatty, tokenizer):
    """A streamer, and several answers."""
    with pytest.raises(ValueError, match="does not take a streamer"):
        next(chatty.stream_chat(tokenizer, "你好", streamer=None))
    with pytest.raises(ValueError, match="chat returns one answer"):
        chatty.chat(tokenizer, "你好", num_return_sequences=3)


def test_chat_with_an_offloaded_embedding(tiny_model, tokenizer):
    """accelerate may offload the embedding; chat sends input_ids to the device where it will run."""

    from accelerate import cpu_offload

    model = cpu_offload(copy.deepcopy(tiny_model), torch.device("cpu"))
    want = tiny_model.chat(tokenizer, "你好", do_sample=False)
    assert model.chat(tokenizer, "你好", do_sample=False) == want
    *_, streamed = model.stream_chat(tokenizer, "你好", do_sample=False)
    assert streamed == want


def test_arguments_are_not_modified(chatty, tokenizer):
    """history and logits_processor are not modified; the original's list grew with every chat."""
    history, processors = [["a", "b"]], LogitsProcessorList([Forbid([5])])
    chatty.chat(tokenizer, "你好", history, logits_processor=processors, **GREEDY)
    list(chatty.stream_chat(tokenizer, "你好", history, logits_processor=processors, **GREEDY))
    assert history == [["a", "b"]] and len(processors) == 1 and processors[0].calls == 24


@pytest.mark.parametrize("ids", [(), (5, 6)], ids=["all", "some"])
@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_non_finite_scores_do_not_raise(chatty, tokenizer, fill, do_sample, ids):
    """A token is still chosen, by sampling or greedily, with one warning of nan and inf; all nan is an error."""
    processors = LogitsProcessorList([Forbid(ids, fill)])
    options = {"logits_processor": processors, "do_sample": do_sample, "max_new_tokens": 3}
    if fill != fill and not ids:
        with pytest.raises(ValueError, match="scores are all nan: its weights are finite"):
            chatty.chat(tokenizer, "你好", **options)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        response, _ = chatty.chat(tokenizer, "你好", **options)
    assert isinstance(response, str) and processors[0].calls == 3
    warned = [str(warning.message) for warning in caught if "nan or inf" in str(warning.message)]
    assert len(warned) == (0 if fill == -float("inf") else 1)


def test_padded_vocabulary_ids_decode_to_nothing(chatty, tokenizer):
    """Ids of the padded embedding can be generated; the answer skips them."""
    only = LogitsProcessorList([Forbid(range(tokenizer.vocab_size))])
    response, _ = chatty.chat(tokenizer, "你好", logits_processor=only, **GREEDY)
    assert response == ""
    assert list(chatty.stream_chat(tokenizer, "你好", logits_processor=only, **GREEDY)) == [("", [("你好", "")])]


def test_oldest_rounds_are_dropped(chatty, tokenizer):
    """max_history_tokens keeps the last rounds that fit, numbered from 1; the returned history is complete."""
    history = [(f"问题{i}" * 4, f"回答{i}" * 4) for i in range(6)]
    with_last = chatty.build_inputs(tokenizer, "你好", history[-1:])["input_ids"].shape[1]
    budget = with_last - chatty.build_inputs(tokenizer, "你好")["input_ids"].shape[1]
    response, new = chatty.chat(tokenizer, "你好", history, max_history_tokens=budget, **GREEDY)
    assert response == chatty.chat(tokenizer, "你好", history[-1:], **GREEDY)[0] and new[:-1] == history
    *_, (streamed, _) = chatty.stream_chat(tokenizer, "你好", history, max_history_tokens=budget, **GREEDY)
    assert streamed == response
    assert chatty._recent_rounds(tokenizer, "你好", history, budget - 1) == []


def test_too_long_prompts_are_rejected_before_the_forward_pass(chatty, tokenizer):
    """Prompt and answer beyond seq_length: an error with the numbers and the remedy, and no forward pass."""
    *_, (_, history, cache) = chatty.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    chatty.transformer.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match="exceed seq_length=512. Shorten the prompt or lower max_new_tokens to"):
        chatty.chat(tokenizer, "你好", do_sample=False, max_new_tokens=510)
    with pytest.raises(ValueError, match="exceed seq_length=512"):
        next(chatty.stream_chat(tokenizer, "你好", do_sample=False, max_new_tokens=510))
    with pytest.raises(ValueError, match="leaves none for an answer.*max_history_tokens"):
        chatty.chat(tokenizer, "你好" * 300)
    with pytest.raises(ValueError, match="max_history_tokens cannot drop rounds from a cache"):
        next(chatty.stream_chat(tokenizer, "你好", history, cache, max_history_tokens=5))


@pytest.mark.parametrize("limits", [{"max_length": 0}, {"max_length": -5}, {"max_new_tokens": 0}], ids=str)
def test_no_room_for_an_answer_is_an_error(chatty, tokenizer, limits):
    """0 is no word for "no limit"; max_length=None is."""
    message = "max_(length|new_tokens)=.*(give 1 or more|raise max_length)|leaves none for an answer: max_length"
    with pytest.raises(ValueError, match=message):
        chatty.chat(tokenizer, "你好", **limits)
    with pytest.raises(ValueError, match=message):
        next(chatty.stream_chat(tokenizer, "你好", **limits))
    steps = chatty.stream_chat(tokenizer, "你好", max_length=None)
    next(steps)
    steps.close()


@pytest.mark.parametrize("query", ["", "  \n", None])
def test_empty_messages_are_answered(chatty, tokenizer, query):
    """An Enter on an empty line, a first message by the assistant: the original's prompt, where None reads "None"."""
    history = [(None, "您好"), ("", None)]
    past = "[Round 1]\n\n问：None\n\n答：您好\n\n[Round 2]\n\n问：\n\n答：None\n\n"
    prompt = f"{past}[Round 3]\n\n问：{query}\n\n答："
    assert tokenizer.build_prompt(query, history) == prompt
    response, new = chatty.chat(tokenizer, query, history, **GREEDY)
    ids = tokenizer(prompt, return_tensors="pt")
    output = chatty.generate(**ids, **GREEDY)[0, ids["input_ids"].shape[1] :].tolist()
    assert response == chatty.process_response(tokenizer.answer(output)) and new == [*history, (query, response)]
    *_, streamed = chatty.stream_chat(tokenizer, query, history, **GREEDY)
    assert streamed == (response, new)


@pytest.mark.parametrize("wrong", [None, "你好", object()], ids=["None", "str", "object"])
def test_a_tokenizer_of_another_kind_is_named(chatty, wrong):
    """A folder without tokenizer_config.json gives one of transformers' own; arguments may be in the wrong order."""
    for call in (chatty.chat, chatty.stream_chat, chatty.build_inputs, chatty.build_stream_inputs):
        with pytest.raises(ValueError, match=f"tokenizer is a builtins.{type(wrong).__name__}, not .* Load it by"):
            next(iter(call(wrong, "你好", [("你好", "你好！")])))


def test_system_prompt(chatty, tokenizer):
    """`system` goes in front of the first round, into no history, and stays in the cache of later rounds."""
    history = [("你好", "你好！")]
    want = "请简短。\n\n[Round 1]\n\n问：你好\n\n答：你好！\n\n[Round 2]\n\n问：再见\n\n答："
    assert tokenizer.build_prompt("再见", history, "请简短。") == want
    response, new = chatty.chat(tokenizer, "再见", history, system="请简短。", **GREEDY)
    assert response != chatty.chat(tokenizer, "再见", history, **GREEDY)[0] and new == [*history, ("再见", response)]
    asked = {"system": "请简短。", "return_past_key_values": True, **GREEDY}
    *_, (streamed, new, cache) = chatty.stream_chat(tokenizer, "再见", history, **asked)
    assert streamed == response
    held, turn = cache.get_seq_length(), chatty.build_stream_inputs(tokenizer, "你好", new)["input_ids"]
    *_, (_, _, cache) = chatty.stream_chat(tokenizer, "你好", new, cache, **asked)
    assert cache.get_seq_length() == held + turn.shape[1] + 11


def test_temperature_zero_is_greedy(chatty, tokenizer):
    """As in every API that people know; transformers itself rejects a temperature of 0."""
    want = chatty.chat(tokenizer, "你好", **GREEDY)
    assert chatty.chat(tokenizer, "你好", temperature=0, max_new_tokens=12) == want
    *_, streamed = chatty.stream_chat(tokenizer, "你好", temperature=0.0, max_new_tokens=12)
    assert streamed == want


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("你好", "got a str"),
        ([("a", "b"), ("c",)], r"history\[1\] must be \(query, response\), two strings, got \('c',\)"),
        ([{"role": "user", "content": "x"}], r"history\[0\] must be .* got \{'role'"),
        ([("a", 3)], r"history\[0\]"),
        (["ab"], r"history\[0\] must be .* got 'ab'"),
    ],
)
def test_malformed_queries_and_histories_are_rejected(chatty, tokenizer, history, message):
    """The error shows the malformed text or round, and the expected form. Two keys would unpack into a round, too."""
    with pytest.raises(ValueError, match="query must be a string, got 3"):
        chatty.chat(tokenizer, 3)
    for call in (chatty.chat, chatty.stream_chat, chatty.build_inputs, chatty.build_stream_inputs):
        with pytest.raises(ValueError, match=message):
            next(iter(call(tokenizer, "你好", history)))
    with pytest.raises(ValueError, match=message):
        tokenizer.build_prompt("你好", history)


def test_process_response(chatty):
    """Responses are stripped and the training date is filled in, as in the original."""
    assert chatty.process_response("\n[[训练时间]] x\n") == "2023年 x"


# The original's transcripts, with the released vocabulary


@pytest.fixture(scope="module")
def transcript():
    path = SHARED / "golden" / "chat.json"
    if not path.exists():
        pytest.skip("the released tokenizer.model is not part of the project")
    from chatglm2.configuration_chatglm import ChatGLMConfig
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm2.tokenization_chatglm import ChatGLMTokenizer
    from formula import formula_weights

    golden = json.loads(path.read_text())
    config = {key: value for key, value in golden["config"].items() if key not in ("auto_map", "model_type")}
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**config))
    model.load_state_dict(formula_weights(golden["weights"]))
    released = ChatGLMTokenizer(str(SHARED / "chatglm2-6b" / "tokenizer.model"))
    return golden["results"], model.float().eval(), released


def test_transcripts_match_the_original(transcript):
    """chat, stream_chat and three rounds with one cache give the original's text and cache length."""
    results, model, released = transcript
    for key in ("chat", "chat_history"):
        x = results[key]
        history = [tuple(turn) for turn in x.get("history_in", [])]
        assert model.chat(released, x["query"], history, **x["kwargs"])[0] == x["response"]
    past = None
    for x in results["stream_chat_rounds_with_cache"]:
        history = [tuple(turn) for turn in x["history_in"]]
        *_, last = model.stream_chat(released, x["query"], history, past, **x["kwargs"])
        text, _, past = last
        assert text == x["responses"][-1] and past.get_seq_length() == x["past_length_out"]
