"""transformers' pipelines on the tiny checkpoint, as Auto classes load it."""

import threading

import pytest
import torch
from chatglm2.modeling_chatglm import ChatGLMForSequenceClassification
from conftest import ANSWERS, TINY
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

pytestmark = pytest.mark.needs_transformers("4.48", "pipelines over messages")

GREEDY = {"do_sample": False, "max_new_tokens": 64}


def load(**settings):
    return AutoModelForCausalLM.from_pretrained(TINY, trust_remote_code=True, **settings).float().eval()


@pytest.fixture(scope="module")
def generator():
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    return pipeline("text-generation", load(), tokenizer=tokenizer)


def messages(query):
    return [{"role": "user", "content": query}]


def answer(result):
    return result[0]["generated_text"][-1]["content"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation_answers_messages(generator, batch_size):
    """Conversations of unlike lengths, one by one and as a padded batch, end with the learned answers."""
    results = generator([messages(query) for query in ANSWERS], batch_size=batch_size, **GREEDY)
    assert list(map(answer, results)) == list(ANSWERS.values())


def test_streamer(generator):
    """TextIteratorStreamer hands the answer out piece by piece while the pipeline runs."""
    streamer = TextIteratorStreamer(generator.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generator, args=(messages("早上好"),), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 5 and "".join(pieces) == ANSWERS["早上好"]


@pytest.mark.needs_transformers("4.49", "assisted pipelines without a NameError of their own")
def test_assisted_generation(generator):
    """A draft model, here the same model, proposes tokens: the same answer in less than half of the model's steps."""
    draft = load()
    assisted = pipeline(
        "text-generation", load(), tokenizer=generator.tokenizer, assistant_model=draft,
        assistant_tokenizer=generator.tokenizer,
    )  # fmt: skip
    steps = []
    assisted.model.register_forward_hook(lambda *_: steps.append(1))
    assert answer(assisted(messages("你好"), **GREEDY)) == ANSWERS["你好"]
    assert len(steps) < len(generator.tokenizer.tokenize(ANSWERS["你好"])) / 2


@torch.no_grad()
def test_text_classification(tokenizer):
    """The pipeline's scores are the softmax of the head's logits, for single texts and for a padded batch."""
    torch.manual_seed(0)
    model = ChatGLMForSequenceClassification.from_pretrained(TINY, num_labels=3).float().eval()
    classify = pipeline("text-classification", model, tokenizer=tokenizer)
    texts = ["你好", "How are you today, my friend?"]
    for batch_size in (1, 2):
        for text, scores in zip(texts, classify(texts, top_k=None, batch_size=batch_size)):
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            got = {score["label"]: score["score"] for score in scores}
            torch.testing.assert_close(torch.tensor([got[f"LABEL_{i}"] for i in range(3)]), expected)
