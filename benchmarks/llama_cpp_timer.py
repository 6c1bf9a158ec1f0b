"""llama.cpp at the 6.2B shapes with random weights: a process that reads on its standard input what to time.

    python benchmarks/llama_cpp_timer.py {q4_0,q8_0} LAYERS THREADS      needs: pip install llama-cpp-python gguf

It prints "ready", then for each line "prefill N" or "decode N" (after 32 tokens) the seconds per token.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp
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
    writer.add_context_length(8192)
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


def main():
    kind, layers, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # llama.cpp's own words go with the errors
    path = Path(tempfile.gettempdir(), f"chatglm2_random_{kind}_{layers}.gguf")
    if not path.exists():
        write_model(path.with_suffix(".part"), kind, layers)
        path.with_suffix(".part").rename(path)
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 1024
    parameters.n_threads = parameters.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    memory = llama_cpp.llama_get_memory(context)

    def feed(count):
        tokens = (llama_cpp.llama_token * count)(*range(100, 100 + count))
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(context)

    feed(32)
    print("ready", file=answers)
    for line in sys.stdin:
        what, count = line.split()
        llama_cpp.llama_memory_clear(memory, True)
        if what == "decode":
            feed(32)
        begin = time.perf_counter()
        for _ in range(int(count) if what == "decode" else 1):
            feed(1 if what == "decode" else int(count))
        print((time.perf_counter() - begin) / int(count), file=answers)


if __name__ == "__main__":
    main()
