"""vLLM's own engine on this CPU: the folder as it is, the GLM exports, two processes, and its server.

`make vllm` makes an environment for it, since vLLM pins its releases of torch and transformers. What is compared are
ids, of prompts and of greedy answers.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ANSWERS, TINY, TINY3, free_port, listens, until

pytestmark = pytest.mark.vllm

SETTINGS = {  # before vllm is imported, here and by its processes
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines of one process run in this one
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
LENGTH = 512  # tokens of a conversation
SEATS = 4  # answers that the server computes at a time
OTHERS = {"int4": {"bits": 4}, "groups": {"bits": 4, "group_size": 32}, "int8": {"bits": 8}}
OTHERS["mixed"] = {"bits": 4, "skip": "layers.1.mlp", "embedding": True, "output_layer": True}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{name: (folder for vLLM, our model on the weights that it was made of, our tokenizer)}."""
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm2.tokenization_chatglm import ChatGLMTokenizer
    from to_glm import export

    def make(name):
        source = TINY3 if name == "tiny3" else TINY
        folder = source
        model = ChatGLMForConditionalGeneration.from_pretrained(source, torch_dtype=torch.float16)
        tokenizer = ChatGLMTokenizer.from_pretrained(source)
        if name in OTHERS:
            source, folder = (tmp_path_factory.mktemp(name) / part for part in ("source", "glm"))
            model.quantize(**OTHERS[name]).save_pretrained(source)
            tokenizer.save_pretrained(source)
            export(source, folder)
        elif name == "glm":
            folder = tmp_path_factory.mktemp(name) / "glm"
            export(source, folder)
        return folder, model.eval(), tokenizer

    return {name: make(name) for name in ("tiny", "tiny3", "glm", *OTHERS)}


@pytest.fixture(scope="module")
def vllm(exported):
    """The package. Its Transformers backend changes GlmModel for good, so everything is exported before."""
    pytest.importorskip("vllm", reason="`make vllm` runs this in an environment that has vLLM")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        import vllm

        yield vllm


def conversations(folder):
    """Messages up to a question: first rounds, and later ones."""
    if folder == TINY3:
        return [[{"role": "user", "content": query}] for query in ("你好", "早上好", "谢谢")]
    first = [[{"role": "user", "content": query}] for query in ANSWERS]
    lines = (TINY / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    turns = next(turns for turns in (json.loads(line)["turns"] for line in lines) if len(turns) > 1)
    texts = [text for turn in turns for text in turn][:-1]
    later = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [*first, later]


@torch.no_grad()
def ours(model, tokenizer, chats):
    """[(ids of the prompt, ids of the greedy answer)] by this package."""
    pairs = []
    for messages in chats:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64)[0].tolist()
        pairs.append((ids, out[len(ids) :]))
    return pairs


def theirs(vllm, folder, chats, **options):
    """The same by a new engine of vLLM, for all conversations at once."""
    llm = vllm.LLM(str(folder), trust_remote_code=True, enforce_eager=True, max_model_len=LENGTH, **options)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=64)
    outputs = llm.chat(chats, greedy, use_tqdm=False)
    return [(list(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]


@torch.no_grad()
@pytest.mark.parametrize("name", ["int4", "groups", "int8"])
def test_transformers_reads_the_exports(exported, name):
    """With compressed-tensors, which comes with vLLM, and no code of this package: the same greedy answer.

    Before any engine: see the fixture `vllm`.
    """
    pytest.importorskip("compressed_tensors", reason="`make vllm` runs this in an environment that has it")
    from transformers import AutoModelForCausalLM

    folder, model, tokenizer = exported[name]
    [(prompt, answer)] = ours(model, tokenizer, conversations(folder)[:1])
    glm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    ids = glm.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[0].tolist()
    assert type(glm).__name__ == "GlmForCausalLM" and ids == prompt + answer


@pytest.mark.parametrize("name", ["tiny", "tiny3", "glm", *OTHERS])
def test_greedy_answers(vllm, exported, name):
    """Prompts and answers, id by id, are those of chat() here: the folder as it is by vLLM's ChatGLM, and exports."""
    folder, model, tokenizer = exported[name]
    chats = conversations(folder)
    assert theirs(vllm, folder, chats) == ours(model, tokenizer, chats)


@pytest.mark.parametrize("name", ["tiny", "int4"])
def test_tensor_parallelism(vllm, exported, name):
    """Two processes, each with half of the heads and of the feed-forward rows, on a core each, answer the same."""
    folder, model, tokenizer = exported[name]
    chats = conversations(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        assert theirs(vllm, folder, chats, tensor_parallel_size=2) == ours(model, tokenizer, chats)


# ---- the server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(vllm, tmp_path_factory):
    """An openai client of the server that `vllm serve examples/tiny --trust-remote-code` starts.

    vllm-cpu's `vllm` command looks for a package named vllm, and stops: the module behind it does not.
    """
    import openai

    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", TINY]
    command += ["--trust-remote-code", "--enforce-eager"]
    options = ["--max-model-len", str(LENGTH), "--max-num-seqs", str(SEATS), "--port", str(port)]
    with log.open("w") as f:
        process = subprocess.Popen([*command, *options], stdout=f, stderr=f, env={**os.environ, **SETTINGS})
    try:
        until(lambda: listens(f"http://localhost:{port}/health", process, log), "no answer", seconds=200)
        with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def ask(client, query, **settings):
    """A greedy chat completion."""
    messages = [{"role": "user", "content": query}]
    settings = {"max_tokens": 64, "temperature": 0, **settings}
    return client.chat.completions.create(model=str(TINY), messages=messages, **settings)


def streamed(client, query):
    """The pieces of text of a streamed answer."""
    return [chunk.choices[0].delta.content or "" for chunk in ask(client, query, stream=True)]


def test_chat_completion(client):
    """An answer known by heart, ended by </s>; its tokens and the prompt's, [gMASK] sop included, are counted."""
    reply = ask(client, "你好")
    assert reply.choices[0].message.content == ANSWERS["你好"] and reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == 18 and reply.usage.completion_tokens == 23


def test_stream(client):
    """The pieces of a stream, many, make up the answer."""
    pieces = streamed(client, "早上好")
    assert sum(map(bool, pieces)) > 5 and "".join(pieces) == ANSWERS["早上好"]


def test_eight_clients_at_once(client):
    """More than the server has room for, half of them streamed: each gets the answer to its own question."""

    def answer(number, query):
        return "".join(streamed(client, query)) if number % 2 else ask(client, query).choices[0].message.content

    queries = list(ANSWERS) * 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(8), queries)) == [ANSWERS[query] for query in queries]


def test_a_client_that_leaves_frees_its_place(client):
    """As many clients as there is room for leave answers that would go on: the next is served, and nothing runs."""
    endless = {"ignore_eos": True, "min_tokens": LENGTH - 20, "skip_special_tokens": False}
    for _ in range(SEATS):
        with ask(client, "你好", stream=True, max_tokens=LENGTH - 20, extra_body=endless) as stream:
            assert next(iter(stream)).choices
    assert ask(client, "谢谢").choices[0].message.content == ANSWERS["谢谢"]
    until(lambda: running(client) == 0, "the server works on, with no one listening")


def running(client):
    """Answers that the server works on, by its own count."""
    import urllib.request

    url = f"http://localhost:{client.base_url.port}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    counts = [line.split()[-1] for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
    return sum(map(float, counts))
