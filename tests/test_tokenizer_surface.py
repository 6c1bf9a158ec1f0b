"""What the original's tokenizer offers to other people's code, its values, and what users may change about it."""

import json

import pytest
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT, SHARED, TINY

# Measured on the original with transformers 4.30.2
VALUES = {
    "bos_token": None,  # LLaMA-Factory puts a bos before every round where there is one
    "bos_token_id": None,
    "eos_token": "</s>",
    "eos_token_id": 2,
    "pad_token": "<unk>",
    "pad_token_id": 0,
    "unk_token": "<unk>",
    "unk_token_id": None,
    "mask_token": None,
    "mask_token_id": None,
    "sep_token": None,
    "sep_token_id": None,
    "cls_token": None,
    "cls_token_id": None,
    "all_special_ids": [],
    "special_tokens_map": {},
    "model_max_length": int(1e30),
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask", "position_ids"],
}


@pytest.fixture(scope="module", params=[TINY, SHARED / "chatglm2-6b"], ids=["tiny", "released"])
def any_tokenizer(request):
    if not (request.param / "tokenizer.model").exists():
        pytest.skip("the released tokenizer.model is not part of the project")
    return ChatGLMTokenizer(str(request.param / "tokenizer.model"))


def test_attributes_have_the_original_values(any_tokenizer):
    """Built from tokenizer.model and from a folder: tokenizer_config.json changes none of them."""
    config = json.loads((ROOT / "tokenizer_config.json").read_text())
    assert config.keys() == {"tokenizer_class", "auto_map", "padding_side"}
    assert {name: getattr(any_tokenizer, name) for name in VALUES} == VALUES
    assert any_tokenizer.vocab_size == len(any_tokenizer) == any_tokenizer.tokenizer.n_words


def test_silent_ids_have_no_token(any_tokenizer):
    """<unk>, <s>, </s>, the commands and the padded embedding."""
    commands = any_tokenizer.tokenizer.special_tokens
    silent = [0, 1, 2, commands["[MASK]"], commands["eop"], any_tokenizer.vocab_size]
    assert any_tokenizer.convert_ids_to_tokens(silent) == [""] * 6


def test_inner_tokenizer(any_tokenizer):
    """tokenizer.tokenizer's methods: text to pieces and ids, and back, without [gMASK] sop."""
    inner, text = any_tokenizer.tokenizer, "你好 a"
    pieces = inner.tokenize(text)
    assert pieces == any_tokenizer.tokenize(text) == inner.sp_model.EncodeAsPieces(text)
    ids = inner.encode(text)
    assert ids == [inner.convert_token_to_id(piece) for piece in pieces]
    assert ids == any_tokenizer.encode(text, add_special_tokens=False)
    assert inner.encode(text, bos=True, eos=True) == [1, *ids, 2]
    assert inner.decode([1, *ids, 2]) == inner.decode_tokens(pieces) == text
    assert inner.convert_token_to_id("[gMASK]") == inner.special_tokens["[gMASK]"]
    assert inner.convert_token_to_id("no piece of it") == 0
    assert [inner.convert_id_to_token(i) for i in (0, 1, 2, inner.n_words - 1, ids[-1], -1)] == [
        "", "", "", "", pieces[-1], "",
    ]  # fmt: skip
    assert (inner.bos_id, inner.eos_id, inner.pad_id) == (1, 2, 0)


def test_words_are_encoded_one_by_one(any_tokenizer):
    """is_split_into_words: every word is a text of its own, with SentencePiece's space, as in the original."""
    words = ["hello", "world", "你好", " a"]
    ids = any_tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert ids == [i for word in words for i in any_tokenizer.tokenizer.encode(word)]
    english = any_tokenizer(words[:2], is_split_into_words=True)["input_ids"]
    assert english == any_tokenizer("hello world")["input_ids"]


# What users may change


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("bos_token", "eos_token", "pad_token", "sep_token"),
        pytest.param("unk_token", marks=pytest.mark.needs_transformers("4.34", "an unk_token outside the vocabulary")),
    ],
)
def test_special_tokens_of_the_user_are_kept(tmp_path, name):
    """from_pretrained(eos_token=...): a new id in text and in the attribute, also after save and reload."""
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY, **{name: "<|mine|>"})
    for which in (tokenizer, saved(tokenizer, tmp_path)):
        assert getattr(which, name) == "<|mine|>"
        assert getattr(which, name + "_id") == which.vocab_size == len(which) - 1
        assert which.vocab_size in which.encode("a<|mine|>b", add_special_tokens=False)
        assert which.decode([which.vocab_size], skip_special_tokens=True) == ""
        assert not {0, 1, 2} & set(which.encode("<s></s><unk>", add_special_tokens=False))


def test_added_eos_token_survives_reload(tmp_path):
    """add_special_tokens({"eos_token": ...}), as scripts do for ChatML."""
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    assert tokenizer.add_special_tokens({"eos_token": "<|im_end|>"}) == 1
    again = saved(tokenizer, tmp_path)
    assert (again.eos_token, again.eos_token_id) == ("<|im_end|>", tokenizer.vocab_size)
    assert again("a<|im_end|>")["input_ids"] == tokenizer("a<|im_end|>")["input_ids"]
    assert again.get_command("<eos>") == 2


def test_special_tokens_may_name_built_in_ones(tmp_path):
    """bos_token="<s>": its id is 1 then, and the text "<s>" stays text."""
    tokenizer = saved(ChatGLMTokenizer.from_pretrained(TINY, bos_token="<s>", mask_token="[MASK]"), tmp_path)
    assert tokenizer.bos_token_id == 1 and tokenizer.mask_token_id == tokenizer.get_command("[MASK]")
    assert len(tokenizer) == tokenizer.vocab_size
    assert not {1, tokenizer.mask_token_id} & set(tokenizer.encode("<s>[MASK]", add_special_tokens=False))


@pytest.mark.parametrize("by_constructor", [False, True])
def test_split_special_tokens(tmp_path, by_constructor):
    """split_special_tokens=True: added special tokens are text, other added tokens stay whole."""
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY, **({"split_special_tokens": True} if by_constructor else {}))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.add_tokens(["<tool>"])
    options = {} if by_constructor else {"split_special_tokens": True}
    for which in (tokenizer, saved(tokenizer, tmp_path)):
        special, plain = which.convert_tokens_to_ids(["<|user|>", "<tool>"])
        tokens = which.tokenize("好<|user|><tool>", **options)
        assert "<|user|>" not in tokens and tokens[-1] == "<tool>"
        if by_constructor:
            ids = which("好<|user|><tool>")["input_ids"]
            assert special not in ids and plain in ids
            assert "<|user|>" in which.tokenize("好<|user|><tool>", split_special_tokens=False)


@pytest.mark.needs_transformers("4.34", "slow tokenizers keep the options of an AddedToken")
def test_options_of_added_tokens():
    """lstrip and rstrip swallow the spaces beside the token, single_word leaves it within a word."""
    from transformers import AddedToken

    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True)])
    assert tokenizer.tokenize("a  <l> b") == [*tokenizer.tokenize("a"), "<l>", *tokenizer.tokenize(" b")]
    assert tokenizer.tokenize("a <r>  b") == [*tokenizer.tokenize("a "), "<r>", *tokenizer.tokenize("b")]
    tokenizer.add_tokens([AddedToken("<w>", single_word=True)])
    assert "<w>" in tokenizer.tokenize("a <w> b") and "<w>" not in tokenizer.tokenize("a<w>b")


def test_spaces_between_special_tokens():
    """Added tokens are decoded as they stood in the text, or with spaces around them if asked for."""
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<tool>"])
    ids = tokenizer.encode("好<tool>好", add_special_tokens=False)
    assert tokenizer.decode(ids) == "好<tool>好"
    assert tokenizer.decode(ids, spaces_between_special_tokens=True) == "好 <tool> 好"
