"""Measure the package, and what a user would run instead.

    python benchmarks decode        milliseconds per token as the context grows
    python benchmarks prefill       time to the first token by prompt length
    python benchmarks throughput    tokens/s of left-padded batches
    python benchmarks memory        peak memory of a prompt and of a training step
    python benchmarks overhead      the part of a 6.2B decode step outside matrix products and attention
    python benchmarks linear        linear layers with few tokens, as shares of the memory bandwidth
    python benchmarks verify        steps of 2, 4 and 8 tokens beside steps of one: what a draft costs
    python benchmarks quantized     int4, int8 and half precision at the 6.2B shapes, beside llama.cpp and ik_llama.cpp
    python benchmarks against_vllm  int4 at the 6.2B shapes beside vLLM, one sequence and eight at once
    python benchmarks context       int4 as the context grows, beside torch's attention, llama.cpp and ik_llama.cpp
    python benchmarks loading       peak memory while a 12.5 GB checkpoint is quantized during loading
    python benchmarks start         from the command to the first and second token, on an int4 and a float16 folder
    python benchmarks footprint     memory of int4 and int8 at the 6.2B shapes, with a prompt and an answer
    python benchmarks lookup        prompt lookup beside plain decoding, where an answer repeats its prompt or not
    python benchmarks quality       what int8, int4 and int4 in groups cost the tiny checkpoint's answers
    python benchmarks documentation_model  train a model on documentation of Debian, for `perplexity`
    python benchmarks perplexity    what int8 and int4 of every kind cost a model on real text
    python benchmarks gpu           one prepared run on a GPU: correct, how fast, in how much memory
    python benchmarks sass          machine instructions that the GPU kernels spend on a byte of weights
    python benchmarks tables        write the pages' tables and the pictures from results/

Each takes --help. A run prints one JSON line and adds it to results/: the settings, the hardware, the versions, the
memory bandwidth and the rate of matrix products that the machine had just then. Contenders take turns within every
round, and a ratio is the median over the rounds; absolute figures drift from run to run.
"""

import argparse
import importlib
import sys

NAMES = tuple(line.split()[2] for line in __doc__.splitlines() if line.startswith("    python"))


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(__doc__)
        raise SystemExit(0 if "--help" in sys.argv[1:2] else 2)
    module = importlib.import_module(sys.argv[1])
    parser = argparse.ArgumentParser(
        prog=f"benchmarks {sys.argv[1]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(parser)
    args = parser.parse_args(sys.argv[2:])
    if getattr(args, "threads", None):
        import torch

        torch.set_num_threads(args.threads)
    module.run(args)


if __name__ == "__main__":
    main()
