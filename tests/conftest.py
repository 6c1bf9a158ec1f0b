"""Shared fixtures and helpers: small random models, the tiny checkpoint, servers to wait for.

The scripts are modules by their file's name: pyproject.toml has their folders in pytest's `pythonpath`.
"""

import importlib.util
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import hypothesis
import pytest

pytest_plugins = ["web_helpers"]  # the fixtures of the page's tests
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import transformers  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from checkpoints import ROOT, TINY, TINY3  # noqa: E402, F401

SHARED = ROOT.parent / "shared"
CODE_FILES = sorted(ROOT.glob("*.py"))


def import_file(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_train():
    """examples/tiny/train.py as a module."""
    return import_file(TINY / "train.py")


def c_kernels(kind, *options, module=None):
    """(the C kernels for CPUs of another kind, "") or (None, why there are none), as `load_library` returns them."""
    from chatglm2 import c_library, quantization_cpu

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c_library, "instructions", lambda: [(kind, (*c_library.FLAGS, *options))])
        return (module or quantization_cpu).load_library.__wrapped__()


ANSWERS = {  # of the tiny checkpoint
    "你好": "你好！我是一个很小的 ChatGLM2 演示模型，很高兴和你聊天。",
    "早上好": "早上好！愿你今天一切顺利，记得吃早餐。",
    "谢谢": "不客气，很高兴能帮上忙。",
    "再见": "再见！祝你一路平安，下次再聊。",
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(true, what, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def listens(url, process, log):
    """Whether `url` answers; fails where its server's `process` has ended, with the end of what it wrote to `log`."""
    assert process.poll() is None, log.read_text(encoding="utf-8")[-3000:]
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def pytest_configure(config):
    if threading.current_thread() is threading.main_thread():  # run in the background, Ctrl-C is ignored, and inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # small tensors: a second thread would only wait, above all beside other work
    config.addinivalue_line(
        "markers", "needs_transformers(release, what): skip where transformers is older than the release that brings it"
    )
    config.addinivalue_line("markers", "tools: uses a tool around the model; `make tools` installs and runs it")
    config.addinivalue_line("markers", "vllm: runs vLLM's engine; `make vllm` installs and runs it")


def release(text):
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers("needs_transformers"):
            needed, what = marker.args
            if release(transformers.__version__) < release(needed):
                item.add_marker(pytest.mark.skip(reason=f"needs transformers {needed}: {what}"))


SMALL = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_group_num": 2,
    "padded_vocab_size": 320,
    "seq_length": 256,
}


@pytest.fixture
def make_config():
    """A factory of small configurations; keyword arguments overwrite the small shape."""
    from chatglm2.configuration_chatglm import ChatGLMConfig

    return lambda **changes: ChatGLMConfig(**{**SMALL, **changes})


@pytest.fixture
def make_model(make_config):
    """A factory of small random models in evaluation mode, seeded, with weights large enough to tell tokens apart."""
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration

    def make(cls=ChatGLMForConditionalGeneration, seed=0, attention="sdpa", **changes):
        torch.manual_seed(seed)
        config = make_config(initializer_range=0.2, **changes)
        config._attn_implementation = attention
        return cls(config).float().eval()

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny checkpoint's tokenizer."""
    from chatglm2.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def tiny_model():
    """The tiny checkpoint in float32; tests must not change it."""
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration.from_pretrained(TINY).float().eval()


@pytest.fixture
def padded_batch():
    """Rows of 9, 6 and 3 tokens: ids [3, 9] padded on the left, their mask, and the rows by themselves."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 320, (1, length), generator=generator) for length in (9, 6, 3)]
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 9 - row.shape[1] :] = row
        mask[i, 9 - row.shape[1] :] = 1
    return ids, mask, rows
