"""transformers' own server and terminal chat run the tiny checkpoint, asked by the real `openai` client."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ANSWERS, TINY, free_port, listens, until

pytestmark = pytest.mark.tools

TRANSFORMERS = Path(sys.executable).with_name("transformers")
# An answer that goes on as long as it may: </s> does not end it, and no token that does is ever made.
ENDLESS = {"max_tokens": 100_000, "extra_body": {"generation_config": '{"eos_token_id": 1604, "pad_token_id": 0}'}}


PAGED = ("--continuous-batching", "--cb-num-blocks", "64")  # not most of the memory, as it takes by itself


@pytest.fixture(scope="module", params=[(0, ()), (0, PAGED), (4, ())], ids=["plain", "paged", "int4"])
def folder_and_options(request, tmp_path_factory):
    """The tiny checkpoint, or the folder of its int4 weights, which samples, and options of the server."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bits, options = request.param
    if not bits:
        return TINY, options
    folder = tmp_path_factory.mktemp("quantized")
    model = AutoModelForCausalLM.from_pretrained(TINY, trust_remote_code=True).quantize(bits)
    model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.8)  # as docs/serving.md says
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY, trust_remote_code=True).save_pretrained(folder)
    return folder, options


@contextmanager
def serving(folder, log, *options):
    """(base URL, process number) of `transformers serve` for this folder."""
    port = free_port()
    command = [TRANSFORMERS, "serve", folder, "--trust-remote-code", "--device", "cpu", "--port", str(port)]
    with log.open("w") as f:
        process = subprocess.Popen([*command, *options], stdout=f, stderr=f, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until(lambda: listens(f"http://localhost:{port}/health", process, log), "no answer", seconds=90)
        yield f"http://localhost:{port}/v1", process.pid
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def server(folder_and_options, tmp_path_factory):
    folder, options = folder_and_options
    with serving(folder, tmp_path_factory.mktemp("serve") / "log.txt", *options) as url_and_number:
        yield url_and_number


@pytest.fixture
def client(server, folder_and_options):
    import openai
    import psutil

    url, number = server
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        client.folder, client.process = folder_and_options[0], psutil.Process(number)
        yield client


def ask(client, *messages, **settings):
    """A greedy chat completion of messages that a user and the assistant take turns in."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    settings = {"max_tokens": 64, "temperature": 0, **settings}
    return client.chat.completions.create(model=str(client.folder), messages=messages, **settings)


def test_chat_completion(client):
    """An answer known by heart, whole, ended by </s>, with the prompt's and the answer's tokens counted."""
    reply = ask(client, "你好")
    assert reply.choices[0].message.content == ANSWERS["你好"] and reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == 18 and reply.usage.completion_tokens == 23


def test_second_round(client, tokenizer):
    """The messages become ChatGLM's rounds: the second answer is that of chat() with the same history."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(client.folder, trust_remote_code=True)
    history = [("谢谢", ANSWERS["谢谢"])]
    expected, _ = model.chat(tokenizer, "再见", history=history, do_sample=False, max_length=512)
    assert ask(client, "谢谢", ANSWERS["谢谢"], "再见").choices[0].message.content == expected


def test_stream(client):
    """The pieces of a stream, many, make up the same answer."""
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, "早上好", stream=True)]
    assert sum(map(bool, pieces)) > 5 and "".join(pieces) == ANSWERS["早上好"]


def test_stream_of_stray_bytes(client, folder_and_options):
    """Bytes in any order, as sampling picks them now and then, do not end a stream before its last token."""
    if PAGED == folder_and_options[1]:
        pytest.skip("continuous batching knows no logit_bias")
    settings = {"temperature": 1, "logit_bias": {str(i): 50.0 for i in range(3, 259)}}
    sampled = {"extra_body": {"generation_config": '{"do_sample": true, "eos_token_id": 2, "pad_token_id": 0}'}}
    chunks = list(ask(client, "你好", stream=True, max_tokens=200, **settings, **sampled))
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 200


def test_temperature(client, folder_and_options):
    """A request's temperature counts where the folder's generation_config samples; with continuous batching it is the
    first request's. These are limits of the server, in docs/serving.md: strike them there when this fails."""
    samples = folder_and_options[0] != TINY
    texts = [ask(client, "你好", temperature=t).choices[0].message.content for t in (0, 100.0, 0)]
    assert texts[0] == texts[2] == ANSWERS["你好"] and (texts[1] != ANSWERS["你好"]) == samples


def test_any_order_of_messages(client):
    """Two questions in a row and a system message behind them are answered, as the template writes them."""
    roles = [("user", "早上好"), ("user", "你好"), ("system", "Be brief."), ("assistant", "好"), ("user", "谢谢")]
    messages = [{"role": role, "content": text} for role, text in roles]
    reply = client.chat.completions.create(model=str(client.folder), messages=messages, max_tokens=3, temperature=0)
    assert reply.choices[0].message.content and reply.usage.completion_tokens == 3


def test_several_clients_at_once(client):
    """Eight requests at the same time, half of them streamed: each gets the answer to its own question."""

    def answer(number, query):
        if number % 2:
            return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, query, stream=True))
        return ask(client, query).choices[0].message.content

    queries = list(ANSWERS) * 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(8), queries)) == [ANSWERS[query] for query in queries]


def busy(process, seconds=0.5):
    """The share of a core that a process uses."""
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return (sum(process.cpu_times()[:2]) - before) / seconds


def test_disconnected_client_frees_its_slot(client):
    """Three clients leave answers that would go on for minutes: the server rests, and serves the next one."""
    for _ in range(3):
        with ask(client, "你好", stream=True, **ENDLESS) as stream:
            for _, _chunk in zip(range(60), stream):  # past the 23 tokens of the answer that it knows
                pass
            assert busy(client.process) > 0.1  # it goes on as long as someone listens
    end = time.monotonic() + 20
    while busy(client.process) > 0.1:
        assert time.monotonic() < end, "the server works on, with no one listening"
    assert ask(client, "谢谢").choices[0].message.content == ANSWERS["谢谢"]


def test_too_long_answer_is_cut(client):
    """max_tokens cuts an answer, and the client is told so."""
    reply = ask(client, "你好", max_tokens=3)
    assert reply.choices[0].finish_reason == "length" and reply.choices[0].message.content == "你好！"


def test_transformers_chat(server, folder_and_options, tmp_path):
    """`transformers chat` talks to the server: the answer stands in the terminal."""
    done = subprocess.run(
        [TRANSFORMERS, "chat", folder_and_options[0], server[0], "do_sample=False"],
        input="再见\n!exit\n",
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},  # offline, it would not talk to localhost either
    )
    assert ANSWERS["再见"] in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
