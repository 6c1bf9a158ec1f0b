"""llama.cpp or ik_llama.cpp at the 6.2B shapes with random weights: a process that is told what to time.

    python benchmarks/peer_timer.py {llama.cpp,ik_llama.cpp} {q4_0,q8_0} LAYERS THREADS CONTEXT

Needs llama-cpp-python or ik-llama-cpp-python, and gguf. It prints a line with the version and the settings, then for
each line "prefill N" or "decode N C" (N tokens, one at a time, after C) on its standard input the seconds. All matrices
have the same type; the files are written once, to the folder for temporary files.
"""

import ctypes
import os
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

HIDDEN, FFN, QKV, VOCABULARY = 4096, 13696, 4608, 65024


def random_blocks(rows, columns, kind, rng):
    """Random weights in ggml's blocks of 32, with scales small enough that nothing overflows."""
    block = {"q4_0": 18, "q8_0": 34}[kind]
    count = rows * columns // 32
    some = rng.integers(0, 256, (min(count, 1 << 20), block), dtype=np.uint8)
    some[:, :2] = np.frombuffer(np.float16(0.002 if kind == "q4_0" else 0.0001).tobytes(), np.uint8)
    return np.resize(some, (rows, columns // 32 * block))


def write_model(path, kind, layers):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "chatglm")
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(layers)
    writer.add_head_count(32)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    matrices = {"token_embd.weight": (VOCABULARY, HIDDEN), "output.weight": (VOCABULARY, HIDDEN)}
    vectors = {"output_norm.weight": np.ones(HIDDEN, np.float32)}
    for i in range(layers):
        matrices[f"blk.{i}.attn_qkv.weight"] = (QKV, HIDDEN)
        matrices[f"blk.{i}.attn_output.weight"] = (HIDDEN, HIDDEN)
        matrices[f"blk.{i}.ffn_up.weight"] = (2 * FFN, HIDDEN)
        matrices[f"blk.{i}.ffn_down.weight"] = (HIDDEN, FFN)
        vectors[f"blk.{i}.attn_qkv.bias"] = np.zeros(QKV, np.float32)
        for norm in ("attn_norm", "ffn_norm"):
            vectors[f"blk.{i}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
    kinds = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    data = {shape: random_blocks(*shape, kind, rng) for shape in set(matrices.values())}
    for name, shape in matrices.items():
        writer.add_tensor(name, data[shape], raw_dtype=kinds[kind])
    for name, vector in vectors.items():
        writer.add_tensor(name, vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_file(kind, layers):
    """A file with the random weights; it is written if it is not there yet."""
    path = Path(tempfile.gettempdir(), f"chatglm2_random_{kind}_{layers}.gguf")
    if not path.exists():
        write_model(path.with_suffix(".part"), kind, layers)
        path.with_suffix(".part").rename(path)
    return str(path).encode()


class Llama:
    """llama.cpp by llama-cpp-python: defaults, so flash attention and, for Q4_0, the layout made while loading."""

    settings = "flash attention"

    def __init__(self, path, threads, room):
        import llama_cpp as api

        self.api, self.version = api, f"llama-cpp-python {version('llama-cpp-python')}"
        api.llama_backend_init()
        self.quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.quiet, None)
        model = api.llama_model_load_from_file(path, api.llama_model_default_params())
        parameters = api.llama_context_default_params()
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.n_ctx, parameters.n_batch = room, 512
        parameters.n_seq_max, parameters.kv_unified = 2, True
        parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = api.llama_init_from_model(model, parameters)
        memory = api.llama_get_memory(self.context)
        self.remove = partial(api.llama_memory_seq_rm, memory)
        self.copy = partial(api.llama_memory_seq_cp, memory)
        self.shift = partial(api.llama_memory_seq_add, memory)

    def feed(self, ids, position):
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        self.api.llama_synchronize(self.context)

    def state(self):
        """Keys and values of sequence 0."""
        data = (ctypes.c_uint8 * self.api.llama_state_seq_get_size(self.context, 0))()
        self.api.llama_state_seq_get_data(self.context, data, len(data), 0)
        return data

    def load(self, data, sequence):
        if not self.api.llama_state_seq_set_data(self.context, data, len(data), sequence):
            raise RuntimeError("llama_state_seq_set_data failed")


class IkLlama(Llama):
    """ik_llama.cpp by ik-llama-cpp-python: also layouts of 4 or 8 rows, made while loading, on large pages."""

    settings = "flash attention, run-time repacking, large pages"

    def __init__(self, path, threads, room):
        from ik_llama_cpp import _ctypes_api as api  # the package's own interface has no caches and no positions

        self.api, self.version = api, f"ik-llama-cpp-python {version('ik-llama-cpp-python')}"
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.use_mmap, parameters.repack_tensors, parameters.use_thp = False, True, True
        model = api.llama_model_load_from_file(path, parameters)
        parameters = api.llama_context_default_params()
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.n_ctx, parameters.n_batch, parameters.n_seq_max = room, 512, 2
        self.context = api.llama_init_from_model(model, parameters)
        library, pointer, number = api._lib, ctypes.c_void_p, ctypes.c_int32
        library.llama_batch_get_one.argtypes = [pointer, number, number, number]
        library.llama_batch_get_one.restype = api.llama_batch
        library.llama_state_seq_get_size.argtypes = [pointer, number, number]
        library.llama_state_seq_get_data.argtypes = [pointer, pointer, ctypes.c_size_t, number, number]
        library.llama_state_seq_set_data.argtypes = [pointer, pointer, ctypes.c_size_t, number, number]
        for name in ("get_size", "get_data", "set_data"):
            getattr(library, f"llama_state_seq_{name}").restype = ctypes.c_size_t
        self.library, handle = library, pointer(self.context)
        self.remove = partial(library.llama_kv_cache_seq_rm, handle)
        self.copy = partial(library.llama_kv_cache_seq_cp, handle)
        self.shift = partial(library.llama_kv_cache_seq_add, handle)

    def feed(self, ids, position):
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        batch = self.library.llama_batch_get_one(tokens, len(ids), position, 0)
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.library.llama_synchronize(ctypes.c_void_p(self.context))

    def state(self):
        data = (ctypes.c_uint8 * self.library.llama_state_seq_get_size(self.context, 0, 0))()
        self.library.llama_state_seq_get_data(self.context, data, len(data), 0, 0)
        return data

    def load(self, data, sequence):
        if not self.library.llama_state_seq_set_data(self.context, data, len(data), sequence, 0):
            raise RuntimeError("llama_state_seq_set_data failed")


class Timer:
    """Times a library, whose cache is filled with copies of the same 32 tokens at rising positions."""

    BLOCK = 32

    def __init__(self, library):
        self.library = library
        library.feed(range(100, 100 + self.BLOCK), 0)
        self.block, self.filled = library.state(), self.BLOCK

    def fill(self, context):
        """Leave this many tokens, a multiple of 32, in the cache."""
        library = self.library
        for position in range(self.filled, context, self.BLOCK):
            library.load(self.block, 1)
            library.shift(1, 0, -1, position)
            library.copy(1, 0, -1, -1)
            library.remove(1, -1, -1)
        if context > self.filled:
            library.feed([100], context)  # rotates the keys to their new positions
        library.remove(0, context, -1)
        self.filled = context

    def decode(self, count, context):
        self.fill(context)
        begin = time.perf_counter()
        for i in range(count):
            self.library.feed([100 + i], context + i)
        return time.perf_counter() - begin

    def prefill(self, count):
        self.library.remove(0, -1, -1)
        begin = time.perf_counter()
        for position in range(0, count, 512):
            self.library.feed(range(100, 100 + min(512, count - position)), position)
        spent = time.perf_counter() - begin
        self.library.remove(0, -1, -1)
        self.filled = 0
        return spent


def main():
    name, kind, layers, threads, room = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the library's own words go with the errors
    library = {"llama.cpp": Llama, "ik_llama.cpp": IkLlama}[name](model_file(kind, layers), threads, room)
    timer = Timer(library)
    print(f"{library.version}, {library.settings}", file=answers)
    for line in sys.stdin:
        what, *numbers = line.split()
        print({"decode": timer.decode, "prefill": timer.prefill}[what](*map(int, numbers)), file=answers)


if __name__ == "__main__":
    main()
