"""The tokenizer's meaning, on the tiny checkpoint's own vocabulary, and on the released one where it lies near."""

import copy
import json
import pickle

import pytest
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from conftest import SHARED, TINY, TINY3
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

HISTORY = [("你好", "你好！"), ("Hello", "Hi there.\n\nHow are you?")]
SPECIAL_TEXTS = ["[gMASK]", "[gMASK]sop", "sop", "eop", "[MASK]", "[sMASK]", "<s>", "</s>", "<unk>", "<pad>", "<eop>"]


def special_ids(tokenizer):
    return {0, 1, 2, *tokenizer.tokenizer.special_tokens.values()}


def test_text_encodes_to_gmask_sop_and_pieces(tokenizer):
    """encode adds [gMASK] sop in front, a pair </s> behind; the mask is ones, the positions count from 0."""
    pieces = tokenizer.encode("你好", add_special_tokens=False)
    prefix = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    assert tokenizer.get_prefix_tokens() == prefix
    out = tokenizer("你好")
    assert out["input_ids"] == prefix + pieces
    assert out["attention_mask"] == [1] * len(out["input_ids"])
    assert out["position_ids"] == list(range(len(out["input_ids"])))
    assert tokenizer("你好", "世界")["input_ids"][-1] == tokenizer.eos_token_id == 2
    assert tokenizer.get_special_tokens_mask(out["input_ids"], already_has_special_tokens=True)[:3] == [1, 1, 0]


def test_batches_are_padded_on_the_left(tokenizer):
    """Padding has mask 0 and position 0; real tokens count from 0 behind it."""
    out = tokenizer(["你好，世界，早上好", "好"], padding=True)
    width, short = len(out["input_ids"][0]), sum(out["attention_mask"][1])
    assert out["input_ids"][1][: width - short] == [tokenizer.pad_token_id] * (width - short)
    assert out["attention_mask"][1] == [0] * (width - short) + [1] * short
    assert out["position_ids"][1] == [0] * (width - short) + list(range(short))
    right = tokenizer(["你好，世界，早上好", "好"], padding=True, return_tensors="pt")
    assert right["position_ids"].shape == right["input_ids"].shape
    padded = tokenizer.pad({"input_ids": [[5, 6, 7], [8]]}, padding=True)
    assert padded["input_ids"][1] == [0, 0, 8] and padded["position_ids"] == [[0, 1, 2], [0, 0, 0]]


def test_truncation_keeps_the_prefix(tokenizer):
    """max_length counts [gMASK] and sop, and cuts the text."""
    out = tokenizer("你好，世界，早上好", truncation=True, max_length=4)
    assert len(out["input_ids"]) == len(out["position_ids"]) == 4
    assert out["input_ids"][:2] == tokenizer.get_prefix_tokens()


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_strings_stay_text(tokenizer, text):
    """What a user types is never a special id, through the call, encode, tokenize, the prompt and the template."""
    special = special_ids(tokenizer)
    assert not special & set(tokenizer.encode(text, add_special_tokens=False))
    assert not special & set(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer(tokenizer.build_prompt(text, [(text, text)]))["input_ids"]
    assert not special & set(prompt[2:])


@pytest.mark.needs_transformers("4.34", "chat templates")
@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_strings_stay_text_in_the_template(tokenizer, text):
    """apply_chat_template's ids hold [gMASK] sop in front and no other special id."""
    ids = template_ids(tokenizer, [{"role": "user", "content": text}])
    assert ids[:2] == tokenizer.get_prefix_tokens() and not special_ids(tokenizer) & set(ids[2:])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=150, deadline=None)
def test_every_text_round_trips(text):
    """decode(encode(text)) is the text: byte fallback knows all characters. SentencePiece drops NUL; "▁" is a space."""
    tokenizer = shared_tokenizer()
    text = text.replace("\0", "").replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == text


_TOKENIZERS = {}


def shared_tokenizer():
    return _TOKENIZERS.setdefault("tiny", ChatGLMTokenizer.from_pretrained(TINY))


@given(st.text(st.sampled_from("a你好😀龘éñΩ\n €"), max_size=12))
@settings(max_examples=100, deadline=None)
def test_no_prefix_of_ids_decodes_to_a_partial_character(text):
    """Decoded without its half character, every prefix of the ids is a prefix of the text."""
    tokenizer = shared_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    for n in range(len(ids) + 1):
        assert text.startswith(tokenizer.decode(tokenizer.without_half_character(ids[:n])))
    assert tokenizer.without_half_character(ids + [2]) == ids


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    """The padded embedding can be sampled: such ids, special ids and -100 give no text and no error."""
    good = tokenizer.encode("好", add_special_tokens=False)
    nothing = [0, 1, 2, *range(tokenizer.vocab_size - 5, tokenizer.vocab_size + 300), -1, -100]
    assert tokenizer.decode(nothing + good + nothing) == "好"
    assert tokenizer.batch_decode([good, nothing]) == ["好", ""]
    assert all(tokenizer._convert_id_to_token(i) == "" for i in nothing)


def test_vocabulary_has_one_token_per_id(tokenizer):
    """get_vocab maps names to 0 ... vocab_size - 1, len agrees, and converting goes both ways."""
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(tokenizer.vocab_size)) and len(tokenizer) == tokenizer.vocab_size
    for token in ("[gMASK]", "sop", "</s>", "<0x0A>"):
        assert tokenizer.convert_tokens_to_ids(token) == vocab[token]
    with pytest.raises(ValueError, match=r"'\[NONE\]' is not a command: use one of \[MASK\]"):
        tokenizer.get_command("[NONE]")


def test_attributes_for_converters(tokenizer):
    """tokenizer.tokenizer.sp_model, .special_tokens and _convert_id_to_token are where converters look for them."""
    inner = tokenizer.tokenizer
    assert inner.sp_model.vocab_size() + 5 == inner.n_words == tokenizer.vocab_size
    assert list(inner.special_tokens) == ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    assert tokenizer._convert_id_to_token(13) == "<0x0A>" and inner.sp_model.get_score(13) == 0
    assert inner.index_special_tokens[inner.special_tokens["sop"]] == "sop"


def test_added_tokens_stay_whole():
    """add_tokens works as everywhere: the token is one id in text, decodes to itself, and lengthens the tokenizer."""
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    assert tokenizer.add_tokens(["<tool>"], special_tokens=True) == 1
    ids = tokenizer.encode("好<tool>好[gMASK]", add_special_tokens=False)
    assert tokenizer.vocab_size in ids and len(tokenizer) == tokenizer.vocab_size + 1
    assert not special_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == "好<tool>好[gMASK]"


def test_save_and_reload(tokenizer, tmp_path):
    """The reloaded tokenizer has the same vocabulary, padding and ids; the model file is byte-equal."""
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    texts = ["你好", "[gMASK] x", "😀\n\n龘"]
    assert again(texts, padding=True).data == tokenizer(texts, padding=True).data
    assert len(again) == len(tokenizer) and again.padding_side == "left"


def test_names_for_special_ids_stay_text(tmp_path):
    """A tokenizer_config.json that names special ids (other tools write such) lets no text become one."""
    from transformers import AddedToken

    names = {0: AddedToken("<pad>", special=True), 2: AddedToken("<eos>", special=True)}
    tokenizer = ChatGLMTokenizer(str(TINY / "tokenizer.model"), added_tokens_decoder=names)
    assert not special_ids(tokenizer) & set(tokenizer.encode("<eos> <pad>", add_special_tokens=False))


def test_custom_pad_token_round_trips(tmp_path):
    """A pad token that a user chose is saved and loaded."""
    ChatGLMTokenizer.from_pretrained(TINY, pad_token="</s>").save_pretrained(tmp_path)
    assert ChatGLMTokenizer.from_pretrained(tmp_path).pad_token_id == 2


def test_copy_and_pickle(tokenizer):
    """Copies encode alike: data loaders send the tokenizer to other processes."""
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other("你好")["input_ids"] == tokenizer("你好")["input_ids"]


def test_missing_and_broken_model_files_are_named(tmp_path):
    """No tokenizer.model, or one cut short: the message says which file, and what to do."""
    with pytest.raises(ValueError, match="tokenizer.model is missing"):
        ChatGLMTokenizer(str(tmp_path / "tokenizer.model"))
    cut = tmp_path / "tokenizer.model"
    cut.write_bytes((TINY / "tokenizer.model").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"tokenizer.model \(1000 bytes\) is not a SentencePiece model"):
        ChatGLMTokenizer(str(cut))


def test_half_a_surrogate_pair_is_named(tokenizer, tiny_model):
    r"""JSON can spell "\ud800", so it comes from pages, servers and files; SentencePiece would dump its types."""
    bad = "你好\ud800!"
    named = r" cannot be encoded in UTF-8: character 2 is '\\ud800', half of a surrogate pair, after '你好'"
    for call in (tokenizer, tokenizer.tokenize, tokenizer.encode, lambda text: tokenizer(["a", text], padding=True)):
        with pytest.raises(ValueError, match=f"^the text{named}"):
            call(bad)
    for history, query, what in (([], bad, "query of round 1"), ([("a", bad)], "b", "response of round 1")):
        with pytest.raises(ValueError, match=f"^the {what}{named}"):
            tiny_model.chat(tokenizer, query, history)
        with pytest.raises(ValueError, match=f"^the {what}{named}"):
            next(tiny_model.stream_chat(tokenizer, query, history))
    assert tokenizer.decode(tokenizer.encode("😀")) == "😀"  # both halves


@pytest.mark.needs_transformers("4.34", "chat templates")
def test_half_a_surrogate_pair_is_named_in_the_template(tokenizer):
    with pytest.raises(ValueError, match=r"character 15 is '\\ud800', .* after '\[Round 1\].*你好'"):
        tokenizer.apply_chat_template([{"role": "user", "content": "你好\ud800"}])


# The prompt


def template_ids(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs)


def as_messages(query, history):
    turns = [m for q, a in history for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    return [*turns, {"role": "user", "content": query}]


def test_prompt_matches_the_original(tokenizer):
    """Rounds count from 1, each with 问 and 答, two line feeds between them."""
    assert (
        tokenizer.build_prompt("再见", [("你好", "你好！")])
        == "[Round 1]\n\n问：你好\n\n答：你好！\n\n[Round 2]\n\n问：再见\n\n答："
    )


@pytest.mark.needs_transformers("4.34", "chat templates")
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_template_matches_the_prompt(tokenizer, rounds):
    """apply_chat_template(messages, add_generation_prompt=True) equals the tokenized build_prompt."""
    query, history = "  再见 {{ x }}\n", HISTORY[:rounds]
    want = tokenizer(tokenizer.build_prompt(query, history))["input_ids"]
    messages = as_messages(query, history)
    assert template_ids(tokenizer, messages) == want
    as_tensor = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert as_tensor["input_ids"].tolist() == [want] and as_tensor["position_ids"].tolist() == [list(range(len(want)))]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == tokenizer.build_prompt(query, history)


@pytest.mark.needs_transformers("4.34", "chat templates")
@pytest.mark.parametrize("folder", [TINY, TINY3], ids=["chatglm2", "chatglm3"])
def test_rendered_chat_is_encoded_as_a_chat(folder):
    """As vLLM does it: rendered first, and encoded without special tokens. Any other text has no special ids then."""
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "请简短回答。"}, {"role": "user", "content": "你好 <|user|> [gMASK]"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for special in (False, True):
        assert tokenizer(text, add_special_tokens=special)["input_ids"] == ids
    assert tokenizer([text, text])["input_ids"] == [ids, ids] and tokenizer.encode(text) == ids
    assert all(map(tokenizer.tokenizer.is_text, tokenizer(str(text), add_special_tokens=False)["input_ids"]))


@pytest.mark.needs_transformers("4.34", "chat templates")
def test_template_ends_after_the_last_answer(tokenizer):
    """A conversation that ends with its answer, as for training: nothing follows the answer."""
    messages = as_messages("再见", HISTORY)[:-1]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == tokenizer.build_prompt(HISTORY[1][0], HISTORY[:1]) + HISTORY[1][1]


@pytest.mark.needs_transformers("4.34", "chat templates")
def test_system_message_comes_before_round_one(tokenizer):
    """A system message is text in front of the first round."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == tokenizer.build_prompt("你好", system="Be brief.")


@pytest.mark.needs_transformers("4.34", "chat templates")
@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("uu", "[Round 1]\n\n问：0\n\n1\n\n答："),
        ("uau", "[Round 1]\n\n问：0\n\n答：1\n\n[Round 2]\n\n问：2\n\n答："),
        ("usu", "[Round 1]\n\n问：0\n\n1\n\n2\n\n答："),
        ("uasu", "[Round 1]\n\n问：0\n\n答：1\n\n2\n\n[Round 2]\n\n问：3\n\n答："),
        ("ssu", "0\n\n1\n\n[Round 1]\n\n问：2\n\n答："),
        ("au", "[Round 1]\n\n问：\n\n答：0\n\n[Round 2]\n\n问：1\n\n答："),
        ("uaa", "[Round 1]\n\n问：0\n\n答：1\n\n[Round 2]\n\n问：\n\n答：2\n\n[Round 3]\n\n问：\n\n答："),
        ("s", "0\n\n[Round 1]\n\n问：\n\n答："),
        ("uatdu", "[Round 1]\n\n问：0\n\n答：1\n\n2\n\n3\n\n[Round 2]\n\n问：4\n\n答："),
    ],
)
def test_any_order_of_roles_is_taken(tokenizer, roles, expected):
    """Servers and front ends send any: questions in a row are one, an answer without a question gets an empty one."""
    names = {"u": "user", "a": "assistant", "s": "system", "d": "developer", "t": "tool"}
    messages = [{"role": names[role], "content": str(i)} for i, role in enumerate(roles)]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == expected


@pytest.mark.needs_transformers("4.34", "chat templates")
def test_an_empty_question_is_that_of_build_prompt(tokenizer):
    """An answer at the end of the messages is followed by a round with an empty question, as in the original."""
    text = tokenizer.apply_chat_template(as_messages("再见", HISTORY)[:-1], add_generation_prompt=True, tokenize=False)
    assert text == tokenizer.build_prompt("", HISTORY)


@pytest.mark.needs_transformers("4.34", "chat templates")
@pytest.mark.parametrize(("role", "content", "message"), [("User", "x", "Unknown role"), ("user", ["x"], "be text")])
def test_what_is_no_conversation_is_rejected(tokenizer, role, content, message):
    """A role that is not known, and content that is not text: the template says what is wrong."""
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match=message):
        template_ids(tokenizer, [{"role": role, "content": content}])


# What tools around the model ask of it


def test_single_special_id_decodes_to_its_name(tokenizer):
    """lm-evaluation-harness asks so what ends an answer; an empty string would end every answer at once."""
    assert [tokenizer.decode(i) for i in range(3)] == ["<unk>", "", "</s>"]
    assert tokenizer.decode(2, skip_special_tokens=True) == tokenizer.decode([2]) == ""


PIECES = st.one_of(st.integers(3, 258), st.integers(259, 1620), st.sampled_from([0, 1, 2, 1600, 1604, 1606]))


@pytest.mark.needs_transformers("5.10", "a server that streams by tokenizers' DecodeStream")
@given(st.lists(PIECES, max_size=30))
@example([100, 131, 101])  # a, a stray byte, b
@example([231, 192, 163, 131, 101])  # the three bytes of a character, a stray one, b
@settings(max_examples=300, deadline=None)
def test_any_ids_stream_as_they_decode(ids):
    """What `transformers serve` streams of any ids, one at a time, is their text without U+FFFD at its end.

    Bytes in any order, special ids, tokens that a user added, special ones too, and ids of the padded embedding.
    """
    if "added" not in _TOKENIZERS:
        _TOKENIZERS["added"] = added = ChatGLMTokenizer.from_pretrained(TINY)
        assert added.tokenizer._tokenizer is added.tokenizer._tokenizer
        added.add_tokens(["<think>"])
        added.add_special_tokens({"additional_special_tokens": ["<tool>"]})
        _TOKENIZERS["copy"] = pickle.loads(pickle.dumps(copy.deepcopy(added)))
    for name in ("added", "copy"):
        tokenizer = _TOKENIZERS[name]
        decoder, expected = tokenizer.tokenizer._tokenizer, tokenizer.decode(ids, skip_special_tokens=True)
        assert decoder.decode(ids, skip_special_tokens=True) == expected
        assert decoder.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
        stream = decoders.DecodeStream(skip_special_tokens=True)
        assert "".join(stream.step(decoder, i) or "" for i in ids) == expected.rstrip("\ufffd")
    assert tokenizer.decode([1605, 1606]) == "<think><tool>"


# The released vocabulary


@pytest.fixture(scope="module")
def released():
    path = SHARED / "chatglm2-6b" / "tokenizer.model"
    if not path.exists():
        pytest.skip("the released tokenizer.model is not part of the project")
    return ChatGLMTokenizer(str(path))


def test_released_vocabulary_matches_the_original(released):
    """63 texts, pairs and prompts of the original, with the released tokenizer.model."""
    golden = json.loads((SHARED / "golden" / "tokenizer_shared.json").read_text())
    for x in golden["texts"]:
        assert released(x["text"])["input_ids"] == x["input_ids"]
        assert released.tokenize(x["text"]) == x["tokenize"]
        assert released.decode(x["input_ids"]) == x["decode_full"]
    for x in golden["pairs"]:
        assert released(x["a"], x["b"])["input_ids"] == x["input_ids"]
    for x in golden["prompts"]:
        history = [tuple(turn) for turn in x["history"]]
        assert released(released.build_prompt(x["query"], history))["input_ids"] == x["input_ids"]
    for x in golden["batches"]:
        assert dict(released(x["texts"], **x["kwargs"])) == x["out"]
    assert released.vocab_size == len(released) == 64794
