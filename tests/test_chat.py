"""chat, stream_chat and stream_generate: what they hand out is what the inherited `generate` produces."""

import copy
import gc
import json
import sys
import threading

import pytest
import torch
from chatglm2.generation_chatglm import stream
from chatglm2.transformers_compat import DynamicCache
from conftest import SHARED
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture
def chatty(make_model, tokenizer):
    """A random model over the carried tokenizer's vocabulary, which never ends by itself."""
    model = make_model(padded_vocab_size=1664, seq_length=512)
    model.generation_config.eos_token_id = None
    return model


class Forbid(LogitsProcessor):
    """Gives some ids no probability, or makes every score nan or inf, and counts its calls."""

    def __init__(self, ids=(), fill=-float("inf")):
        self.ids, self.fill, self.calls = list(ids), fill, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, self.ids or slice(None)] = self.fill
        return scores


class Spell(LogitsProcessor):
    """Makes the model say the given ids."""

    def __init__(self, ids):
        self.left = list(ids)

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -1e4)
        scores[:, self.left.pop(0)] = 0.0
        return scores


def threads():
    return {thread for thread in threading.enumerate() if thread is not threading.current_thread()}


# stream_generate


def test_stream_generate_hands_out_generates_ids(make_model, padded_batch):
    """After step t the stream shows the first t columns that `generate` returns, for a padded batch."""
    model, (ids, mask, _) = make_model(), padded_batch
    settings = {"attention_mask": mask, **GREEDY}
    whole = model.generate(ids, **settings)
    steps = list(model.stream_generate(ids, **settings))
    assert len(steps) == whole.shape[1] - 9
    for t, step in enumerate(steps, start=1):
        assert torch.equal(step, whole[:, : 9 + t])


def test_stream_generate_stops_at_any_of_several_ends_and_pads(make_model, padded_batch):
    """Two eos ids end their rows, ended rows are padded, and the stream ends with the last row."""
    model, (ids, mask, _) = make_model(), padded_batch
    free = model.generate(ids, attention_mask=mask, eos_token_id=None, **GREEDY)[:, 9:]
    ends = [free[0, 2].item(), free[1, 4].item()]
    *_, last = model.stream_generate(ids, attention_mask=mask, eos_token_id=ends, pad_token_id=0, **GREEDY)
    assert torch.equal(last, model.generate(ids, attention_mask=mask, eos_token_id=ends, pad_token_id=0, **GREEDY))
    first_end = next(t for t, token in enumerate(last[0, 9:].tolist()) if token in ends)
    assert set(last[0, 9 + first_end + 1 :].tolist()) <= {0}


def test_stream_generate_takes_processors_criteria_and_samples(make_model, padded_batch):
    """Logits processors and stopping criteria act; a seeded sample equals `generate`'s."""
    model, (ids, mask, _) = make_model(), padded_batch

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = input_ids.shape[1] >= 9 + 4
            return torch.full((len(input_ids),), done) if AFTER_IS_TENSOR else done

    processors = LogitsProcessorList([Forbid(range(3, 200))])
    *_, last = model.stream_generate(
        ids,
        attention_mask=mask,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([After()]),
        do_sample=False,
        max_new_tokens=12,
    )
    assert last.shape[1] == 9 + 4 and not ((last[:, 9:] >= 3) & (last[:, 9:] < 200)).any()
    settings = {"attention_mask": mask, "do_sample": True, "top_k": 20, "max_new_tokens": 8}
    torch.manual_seed(7)
    whole = model.generate(ids, **settings)
    torch.manual_seed(7)
    *_, streamed = model.stream_generate(ids, **settings)
    assert torch.equal(streamed, whole)


AFTER_IS_TENSOR = "Tensor" in str(StoppingCriteriaList.__call__.__annotations__.get("return", ""))


def test_a_consumer_that_leaves_ends_the_generation(make_model):
    """Closing, breaking out, or forgetting the iterator ends generation after the step shown; no thread stays."""
    model, counter = make_model(), Forbid([5])
    before = threads()
    ids = torch.tensor([[7, 8, 9]])
    stream = model.stream_generate(ids, logits_processor=LogitsProcessorList([counter]), eos_token_id=None, **GREEDY)
    next(stream), next(stream)
    assert counter.calls == 2  # in turns: no step is computed before it is asked for
    stream.close()
    for _ in model.stream_generate(ids, **GREEDY):
        break
    gc.collect()
    assert counter.calls == 2 and threads() == before


def test_a_stream_that_is_never_read_starts_nothing(make_model):
    """No thread before the first step is asked for."""
    before = threads()
    stream = make_model().stream_generate(torch.tensor([[7, 8]]), **GREEDY)
    assert threads() == before
    stream.close()


def test_an_exception_in_generation_reaches_the_consumer(make_model):
    """What a processor raises comes out of the iterator, and the thread ends."""

    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise ArithmeticError("on purpose")

    before = threads()
    with pytest.raises(ArithmeticError, match="on purpose"):
        list(
            make_model().stream_generate(torch.tensor([[7]]), logits_processor=LogitsProcessorList([Fails()]), **GREEDY)
        )
    assert threads() == before


def test_an_interrupt_wherever_it_lands_never_hangs():
    """A Ctrl-C at any instruction of the consumer's, in what it calls too, comes out and leaves no lock behind."""
    spared = {method.__code__ for method in (threading.Thread.start, threading.Thread.join, threading.Thread.is_alive)}

    def generate(streamer):
        streamer.put(1)
        streamer.put(2)

    def consume(instruction):
        """What the consumer got, or None after an interrupt before that instruction of its own."""
        got, passed = [], 0

        def trace(frame, event, argument):
            nonlocal passed
            callers, caller = [frame], frame
            while caller and caller.f_code is not stream.__code__:
                caller = caller.f_back
                callers.append(caller)
            if caller is None or spared & {c.f_code for c in callers}:  # those lock what all threads share
                return None
            frame.f_trace_opcodes = True
            passed += event == "opcode"
            if event == "opcode" and passed == instruction:
                raise KeyboardInterrupt
            return trace

        def run():
            nonlocal got
            sys.settrace(trace)
            try:
                got += stream(generate, torch.device("cpu"))
            except KeyboardInterrupt:
                got = None

        consumer = threading.Thread(target=run, daemon=True)
        consumer.start()
        consumer.join(20)
        assert not consumer.is_alive(), f"interrupted at instruction {instruction}, it waits for ever"
        return got

    instruction = 1
    while consume(instruction) is None:
        instruction += 1
    assert consume(instruction) == [1, 2] and instruction > 50


def test_beams_cannot_be_streamed(make_model):
    """transformers refuses a streamer with beams, and says so to the consumer."""
    with pytest.raises(ValueError, match="beam"):
        list(make_model().stream_generate(torch.tensor([[7, 8]]), num_beams=2, **GREEDY))


def test_streams_keep_the_callers_autocast(make_model):
    """Autocast is a matter of the thread in torch: the stream's thread has the consumer's."""
    model, seen = make_model(), []
    model.transformer.output_layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        list(model.stream_generate(torch.tensor([[7, 8]]), do_sample=False, max_new_tokens=2))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_autocast_is_read_on_older_torch_too(monkeypatch):
    """Before 2.4 torch had a function a device for this: the same answers."""
    from chatglm2.torch_compat import autocast_dtype

    answers = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with monkeypatch.context() as older:
                older.delattr(torch, "get_autocast_dtype", raising=False)
                answers.append(autocast_dtype("cpu"))
            assert autocast_dtype("cpu") == answers[-1]
    assert answers == [None, torch.bfloat16]


@pytest.mark.needs_transformers("5.23", "continuous batching on a CPU without a paged| prefix")
def test_continuous_batching_gives_each_prompt_its_own_answer(tiny_model, tokenizer):
    """`generate_batch`: prompts of different lengths in one paged cache, each answered as it is alone."""
    from transformers import ContinuousBatchingConfig

    model, queries = copy.deepcopy(tiny_model), ["你好", "早上好", "谢谢"]
    prompts = [tokenizer(tokenizer.build_prompt(query))["input_ids"] for query in queries]
    config = GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    answers = [tokenizer.decode(results[key].generated_tokens) for key in sorted(results)]
    assert answers == [model.chat(tokenizer, query, do_sample=False)[0] for query in queries]


# chat and stream_chat


def test_stream_chat_extends_one_text_to_chats_answer(chatty, tokenizer):
    """Every step extends the last; the last one, and its history, are what `chat` returns."""
    history = [("你好", "你好！")]
    steps = list(chatty.stream_chat(tokenizer, "再见", history, **GREEDY))
    response, new_history = chatty.chat(tokenizer, "再见", history, **GREEDY)
    texts = [text for text, _ in steps]
    assert all(b.startswith(a.rstrip()) for a, b in zip(texts, texts[1:])) and texts[-1] == response
    assert steps[-1][1] == new_history == [("你好", "你好！"), ("再见", response)]
    assert history == [("你好", "你好！")]


def test_no_step_shows_half_a_character(make_model, tokenizer):
    """A model that spells 😀龘 byte by byte: the stream shows whole characters only, and all of them."""
    want = "😀龘é!"
    spelled = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in want.encode()]

    spelled.insert(5, 1650)  # an id that only the padded embedding has, within a character
    spell = Spell([*spelled, tokenizer.eos_token_id])
    model = make_model(padded_vocab_size=1664)
    texts = [text for text, _ in model.stream_chat(tokenizer, "x", logits_processor=[spell], do_sample=False)]
    assert texts == ["😀", "😀龘", "😀龘é", "😀龘é!"]
    cut, _ = model.chat(tokenizer, "x", logits_processor=[Spell(spelled)], do_sample=False, max_new_tokens=6)
    assert cut == "😀"


def test_no_step_shows_half_a_placeholder(make_model, tokenizer):
    """[[训练时间]] becomes 2023年 at once: no step shows a part of it that the next one would take back."""
    ids = tokenizer.encode("在[[训练时间]]前，[[训", add_special_tokens=False)
    spell, model = Spell([*ids, tokenizer.eos_token_id]), make_model(padded_vocab_size=1664)
    texts = [text for text, _ in model.stream_chat(tokenizer, "x", logits_processor=[spell], do_sample=False)]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:]))
    assert texts[0] == "在" and texts[-1] == "在2023年前，[[训" and not any("[[训练" in text for text in texts)


def test_rounds_with_a_cache_encode_only_their_own_turn(chatty, tokenizer):
    """The next round feeds its own tokens; the cache then holds both rounds, and the answer is that of all ids."""
    fed = []
    chatty.transformer.embedding.word_embeddings.register_forward_hook(lambda m, i, o: fed.append(i[0].shape[1]))
    *_, (first, history, cache) = chatty.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    held = cache.get_seq_length()
    fed.clear()
    *_, (second, history, cache) = chatty.stream_chat(
        tokenizer, "再见", history, cache, return_past_key_values=True, **GREEDY
    )
    turn = tokenizer.encode("\n\n" + tokenizer.build_round(2, "再见"), add_special_tokens=False)[1:]
    assert fed[0] == len(turn) and set(fed[1:]) <= {1}
    assert cache.get_seq_length() == held + len(turn) + 11
    assert [q for q, _ in history] == ["你好", "再见"] and second


def test_a_round_that_was_cut_off_can_be_gone_on_from(chatty, tokenizer):
    """Leaving in the middle keeps history and cache in step: the next round works from what was computed."""
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


def test_an_empty_cache_is_filled_with_the_whole_prompt(chatty, tokenizer):
    """A cache that the caller made is no round before: history and [gMASK] sop go into it."""
    history, cache = [("你好", "你好！")], DynamicCache()
    *_, (text, _, same) = chatty.stream_chat(tokenizer, "再见", history, cache, return_past_key_values=True, **GREEDY)
    assert same is cache and text == chatty.chat(tokenizer, "再见", history, **GREEDY)[0]


def test_a_round_broken_off_before_its_first_text_leaves_the_cache(chatty, tokenizer):
    """Ctrl-C within the prompt's pass: cache and history still tell of the same rounds."""
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


def test_rounds_under_inference_mode_and_outside_of_it(chatty, tokenizer):
    """A cache made under torch.inference_mode() is gone on from without it, and the other way round."""
    with torch.inference_mode():
        *_, (_, history, cache) = chatty.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    *_, (_, history, cache) = chatty.stream_chat(
        tokenizer, "再见", history, cache, return_past_key_values=True, **GREEDY
    )
    with torch.inference_mode():
        *_, (text, _, _) = chatty.stream_chat(tokenizer, "x", history, cache, return_past_key_values=True, **GREEDY)
    assert text


def test_a_generation_config_stands_in_the_place_of_the_settings(chatty, tokenizer):
    """generation_config decides on sampling and length: chat adds nothing to it."""
    config = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0)
    want, _ = chatty.chat(tokenizer, "你好", **GREEDY)
    assert [chatty.chat(tokenizer, "你好", generation_config=config)[0] for _ in range(3)] == [want] * 3
    *_, (streamed, _) = chatty.stream_chat(tokenizer, "你好", generation_config=config)
    assert streamed == want


@pytest.mark.needs_transformers("4.41", "stop_strings")
def test_stop_strings(tiny_model, tokenizer):
    """stop_strings need no tokenizer of their own."""
    assert tiny_model.chat(tokenizer, "你好", do_sample=False, stop_strings=["！"])[0] == "你好！"


def test_what_makes_no_sense_in_a_chat_is_refused(chatty, tokenizer):
    """A streamer, several answers."""
    with pytest.raises(ValueError, match="does not take a streamer"):
        next(chatty.stream_chat(tokenizer, "你好", streamer=None))
    with pytest.raises(ValueError, match="chat returns one answer"):
        chatty.chat(tokenizer, "你好", num_return_sequences=3)


def test_an_offloaded_embedding_is_no_hindrance(tiny_model, tokenizer):
    """accelerate may hold every weight elsewhere until it is needed: chat sends its ids to where they will be."""
    import copy

    from accelerate import cpu_offload

    model = cpu_offload(copy.deepcopy(tiny_model), torch.device("cpu"))
    want = tiny_model.chat(tokenizer, "你好", do_sample=False)
    assert model.chat(tokenizer, "你好", do_sample=False) == want
    *_, streamed = model.stream_chat(tokenizer, "你好", do_sample=False)
    assert streamed == want


def test_the_prefix_of_p_tuning_goes_with_the_cache(make_model, tokenizer):
    """Rounds with a cache work on a P-tuned model: the prefix is counted neither as tokens nor as positions."""
    model = make_model(padded_vocab_size=1664, pre_seq_len=4)
    model.generation_config.eos_token_id = None
    ids = model.build_inputs(tokenizer, "你好")["input_ids"]
    *_, (text, history, cache) = model.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    *_, whole = model.stream_generate(ids, **GREEDY)
    *_, (again, _, cache) = model.stream_chat(tokenizer, "再见", history, cache, return_past_key_values=True, **GREEDY)
    turn = tokenizer.encode("\n\n" + tokenizer.build_round(2, "再见"), add_special_tokens=False)[1:]
    fed = torch.cat((whole[:, :-1], torch.tensor([turn])), dim=1)
    *_, want = model.stream_generate(fed, **GREEDY)
    response = model.process_response(
        tokenizer.decode(tokenizer.without_half_character(want[0, fed.shape[1] :].tolist()))
    )
    assert again == response


def test_the_callers_lists_stay_as_they_are(chatty, tokenizer):
    """history and logits_processor are read, never written; the original's grew with every chat."""
    history, processors = [["a", "b"]], LogitsProcessorList([Forbid([5])])
    chatty.chat(tokenizer, "你好", history, logits_processor=processors, **GREEDY)
    list(chatty.stream_chat(tokenizer, "你好", history, logits_processor=processors, **GREEDY))
    assert history == [["a", "b"]] and len(processors) == 1 and processors[0].calls == 24


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_that_are_not_finite_do_not_raise(chatty, tokenizer, fill, do_sample):
    """A step of nothing but nan or inf gives some token, sampled or not."""
    processors = LogitsProcessorList([Forbid(fill=fill)])
    response, _ = chatty.chat(tokenizer, "你好", logits_processor=processors, do_sample=do_sample, max_new_tokens=3)
    assert isinstance(response, str) and processors[0].calls == 3


def test_ids_of_the_padded_vocabulary_decode_to_nothing(chatty, tokenizer):
    """An id that only the embedding has can be sampled; the answer passes over it."""
    only = LogitsProcessorList([Forbid(range(tokenizer.vocab_size))])
    response, _ = chatty.chat(tokenizer, "你好", logits_processor=only, **GREEDY)
    assert response == ""
    assert list(chatty.stream_chat(tokenizer, "你好", logits_processor=only, **GREEDY)) == [("", [("你好", "")])]


def test_oldest_rounds_are_dropped_to_fit(chatty, tokenizer):
    """max_history_tokens keeps the newest rounds that fit, numbered from 1; the returned history has all of them."""
    history = [(f"问题{i}" * 4, f"回答{i}" * 4) for i in range(6)]
    with_last = chatty.build_inputs(tokenizer, "你好", history[-1:])["input_ids"].shape[1]
    budget = with_last - chatty.build_inputs(tokenizer, "你好")["input_ids"].shape[1]
    response, new = chatty.chat(tokenizer, "你好", history, max_history_tokens=budget, **GREEDY)
    assert response == chatty.chat(tokenizer, "你好", history[-1:], **GREEDY)[0] and new[:-1] == history
    *_, (streamed, _) = chatty.stream_chat(tokenizer, "你好", history, max_history_tokens=budget, **GREEDY)
    assert streamed == response
    assert chatty._recent_rounds(tokenizer, "你好", history, budget - 1) == []


def test_prompts_that_do_not_fit_are_refused_before_work_starts(chatty, tokenizer):
    """Prompt and answer beyond seq_length: one clear error, with the numbers and the cure, and no forward pass."""
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
    with pytest.raises(ValueError, match="exceed seq_length=512"):
        chatty.chat(tokenizer, "你好", generation_config=GenerationConfig(max_new_tokens=510))


@pytest.mark.parametrize("query", ["", "  \n", None, 3])
def test_empty_queries_are_refused(chatty, tokenizer, query):
    """Nothing to answer: a clear error."""
    with pytest.raises(ValueError, match="must be a non-empty string"):
        chatty.chat(tokenizer, query)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("你好", "got a str"),
        ([("a", "b"), ("c",)], r"history\[1\] must be \(query, response\), two strings, got \('c',\)"),
        ([{"role": "user", "content": "x"}], r"history\[0\] must be .* got \{'role'"),
        ([("a", None)], r"history\[0\]"),
    ],
)
def test_histories_of_another_form_are_refused(chatty, tokenizer, history, message):
    """The message shows the round that is wrong, and the right form."""
    with pytest.raises(ValueError, match=message):
        chatty.chat(tokenizer, "你好", history)


def test_process_response(chatty):
    """Stripped, and the training date filled in, as in the original."""
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


def test_transcripts_are_the_originals(transcript):
    """chat, stream_chat, and three rounds on one cache give the original's text, and its cache's length."""
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
