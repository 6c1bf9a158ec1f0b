"""apply_chat_template for training: </s> behind the answer, and the mask of the answers."""

import pytest
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from conftest import SHARED, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.needs_transformers("4.34", "chat templates")
TEXT = st.text(st.sampled_from("ab你好 \n▁😀龘\0"), max_size=8)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def encode(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, return_dict=True, **kwargs)


def masked(tokenizer, messages, **kwargs):
    """(ids, mask) of one conversation."""
    out = encode(tokenizer, messages, return_assistant_tokens_mask=True, **kwargs)
    return out["input_ids"], out["assistant_masks"]


@pytest.fixture(scope="module", params=[TINY, SHARED / "chatglm2-6b"], ids=["tiny", "released"])
def any_tokenizer(request):
    """With the template given, as the released folder of tokenizer.model has none."""
    if not (request.param / "tokenizer.model").exists():
        pytest.skip("the released tokenizer.model is not part of the project")
    template = (TINY / "chat_template.jinja").read_text(encoding="utf-8")
    return ChatGLMTokenizer(str(request.param / "tokenizer.model"), chat_template=template)


def test_answer_to_learn_ends_with_eos(any_tokenizer):
    """The ids are those of the prompt, of the answer by itself and </s>: what the model is to generate."""
    messages = turns("你好", "你好！", "def?", "def f(x):\n    return x")
    prompt = any_tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    answer = any_tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
    ids = any_tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == [*prompt, *answer, any_tokenizer.eos_token_id]
    text = any_tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("答：def f(x):\n    return x") and "generation" not in text


def test_mask_of_every_answer(any_tokenizer):
    """1 for the tokens of the answers, and for the </s> of the last one, which begins with a space as all texts do."""
    ids, mask = masked(any_tokenizer, turns("你好", "Hello there", "再见", "再见！"))
    assert len(ids) == len(mask) and mask[-1] == 1 and ids[-1] == 2
    assert any_tokenizer.decode([i for i, learned in zip(ids, mask) if learned]) == "Hello there 再见！"


@given(st.lists(TEXT, min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_mask_holds_the_answers(texts):
    """Byte pieces, pieces across an answer's edge, "▁", spaces: the masked tokens hold the answers and hardly more."""
    tokenizer = shared_tokenizer()
    texts = [text.replace("\0", "") for text in texts]
    ids, mask = masked(tokenizer, turns(*texts))
    head = len(tokenizer.apply_chat_template(turns(*texts[:3]), add_generation_prompt=True, return_dict=False))
    assert mask[head:] == [1] * (len(ids) - head)
    learned = [i for i, one in enumerate(mask[:head]) if one]
    first = texts[1].replace("▁", " ")
    assert not first or learned == list(range(learned[0], learned[-1] + 1))
    held = tokenizer.decode([4, *(ids[i] for i in learned)])[1:]  # behind another token no space is dropped
    assert first in held and len(held) <= len(first) + 4


_TOKENIZERS = {}


def shared_tokenizer():
    return _TOKENIZERS.setdefault("tiny", ChatGLMTokenizer.from_pretrained(TINY))


def test_mask_beside_added_tokens():
    """Added tokens split the text, and each part begins with a space of its own."""
    tokenizer = ChatGLMTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<tool>"])
    ids, mask = masked(tokenizer, turns("a<tool>b", "<tool>好<tool>", "c", "d"))
    held = tokenizer.decode([i for i, learned in zip(ids, mask) if learned])
    assert held.startswith("<tool>好<tool>") and held.endswith("d") and "\n" not in held


@pytest.mark.needs_transformers("4.40", "chat templates for a batch")
def test_batches_are_padded_and_cut(tokenizer):
    """Masks follow their rows: padding on the left, what truncation cuts; tensors where they are asked for."""
    conversations = [turns("你好", "早上好！"), turns("你好", "早上好！", "再见", "好")]
    whole = [masked(tokenizer, messages) for messages in conversations]
    out = encode(tokenizer, conversations, return_assistant_tokens_mask=True, padding=True, return_tensors="pt")
    width = len(whole[1][0])
    assert out["input_ids"].shape == out["assistant_masks"].shape == out["position_ids"].shape == (2, width)
    for row, mask, (ids, want) in zip(out["input_ids"].tolist(), out["assistant_masks"].tolist(), whole):
        pad = width - len(ids)
        assert row == [0] * pad + ids and mask == [0] * pad + want
    cut = encode(tokenizer, conversations, return_assistant_tokens_mask=True, truncation=True, max_length=18)
    assert cut["input_ids"] == [ids[:18] for ids, _ in whole]
    assert cut["assistant_masks"] == [mask[:18] for _, mask in whole]


def test_continued_answer_has_no_end(tokenizer):
    """continue_final_message: the answer goes on, so that no </s> stands behind it."""
    messages = turns("你好", "早上")
    ids = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids == tokenizer(text)["input_ids"] and ids[-1] != 2


def test_what_gives_no_mask_is_refused(tokenizer):
    """A mask of zeros would teach nothing."""
    messages = turns("你好", "早上好！")
    with pytest.raises(ValueError, match="needs return_dict=True"):
        tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=False)
    plain = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="has no {% generation %} tags"):
        encode(tokenizer, messages, chat_template=plain, return_assistant_tokens_mask=True)


def test_template_in_place_of_ours(tokenizer):
    """Another template with {% generation %}, with and without whitespace control."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}U: {{ message['content'] }}\n{% else %}"
        "A: {% generation %}\n{{ message['content'] }}  {%- endgeneration %} .{% endif %}{% endfor %}"
    )
    ids, mask = masked(tokenizer, turns("x", "y z"), chat_template=template)
    assert tokenizer.decode(ids) == "U: x\nA: y z ."
    assert tokenizer.decode([i for i, learned in zip(ids, mask) if learned]) == "y z"
