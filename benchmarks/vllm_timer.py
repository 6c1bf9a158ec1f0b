"""vLLM on a folder of random weights: a process that reads on its standard input what to time.

    PYTHON benchmarks/vllm_timer.py FOLDER THREADS      with the Python of `make vllm`'s environment

It prints "ready", then for each line "prefill N", "decode N" or "batch N" (N tokens after 32; eight sequences at once)
the seconds.
"""

import os
import sys
import time

CONTEXT, SEQUENCES = 32, 8


def main():
    folder, threads = sys.argv[1], int(sys.argv[2])
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}", HF_HUB_OFFLINE="1")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM's own words go with the errors
    import vllm

    options = {"enable_prefix_caching": False, "max_model_len": 1024, "enforce_eager": True}  # compiling takes minutes
    llm = vllm.LLM(folder, skip_tokenizer_init=True, **options)

    def run(prompt, tokens, sequences=1):
        """Seconds of `tokens` tokens after prompts of `prompt` tokens."""
        prompts = [{"prompt_token_ids": list(range(100 + i, 100 + i + prompt))} for i in range(sequences)]
        length = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, length, use_tqdm=False)
        return time.perf_counter() - begin

    run(CONTEXT, 2)
    print("ready", file=answers)
    for line in sys.stdin:
        what, count = line.split()
        if what == "prefill":
            print(run(int(count), 1), file=answers)
        else:
            sequences = SEQUENCES if what == "batch" else 1
            print(run(CONTEXT, 1 + int(count), sequences) - run(CONTEXT, 1, sequences), file=answers)


if __name__ == "__main__":
    main()
