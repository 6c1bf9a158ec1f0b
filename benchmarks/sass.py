"""Machine instructions that the Triton kernels spend on a byte of weights, or of the cache, counted without a GPU.

The kernels are compiled in the tiles that `quantization_triton.tile_for` chooses, for cards that need not be there, and
the instructions of their longest loop are counted; Triton brings the compiler and the disassembler. A card issues at
most multiprocessors * 128 lanes * clock of them a second, and kernels reach 60 to 70% of that: where the memory
delivers bytes faster, a kernel is bound by its instructions. It is `issue_limit_gb_per_second`, with every cycle
issuing, beside `memory_gb_per_second`.
"""

import collections
import importlib.metadata
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from common import attention_triton, record
from triton_compile import compile_attention, compile_triton

CARDS = {  # name: (capability, multiprocessors, GHz, GB/s of the memory), from the vendor's data sheets
    "H100 SXM": (90, 132, 1.755, 3350),
    "A100 80 GB": (80, 108, 1.41, 2039),
    "RTX 4090": (89, 128, 2.52, 1008),
    "RTX 3060 laptop, 6 GB": (86, 30, 1.7, 336),
}


def arguments(parser):
    parser.add_argument("--capabilities", type=int, nargs="+", default=[86, 90])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256], help="of x")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 5], help="of attention under a mask")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=[4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])


def longest_loop(cubin):
    """Its instructions, as text."""
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = subprocess.run([disassembler, "--dump-sass", path], capture_output=True, text=True, check=True)
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", run.stdout)]
    jumps = ((at, re.search(r"BRA.*?0x([0-9a-f]+)", text)) for at, text in lines)
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    return max(([text for at, text in lines if begin <= at <= end] for begin, end in loops), key=len)


def count(capability, built, bytes_a_turn, warps):
    """The instructions of the longest loop, which is for so many bytes, and the limits that follow."""
    loop = longest_loop(built.asm["cubin"])
    a_byte = len(loop) * 32 * warps / bytes_a_turn
    names = (re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in loop)
    limits = {
        card: round(processors * 128 * ghz / a_byte)
        for card, (of, processors, ghz, _) in CARDS.items()
        if of // 10 == capability // 10
    }
    result = {"instructions_a_byte": round(a_byte, 2), "issue_limit_gb_per_second": limits}
    return {**result, "shared_memory": built.metadata.shared, "most": collections.Counter(names).most_common(8)}


def run(args):
    rows = []

    def say(**row):
        rows.append(row)
        print(row, flush=True)

    for capability in args.capabilities:
        for bits in args.bits:
            for dtype in args.dtypes:
                for row_count in args.rows:
                    name, tile, built = compile_triton(capability, row_count, bits, getattr(torch, dtype))
                    what = {"capability": capability, "bits": bits, "dtype": dtype, "rows": row_count, "kernel": name}
                    say(**what, **count(capability, built, tile.slices * tile.outs * tile.columns, tile.warps))
        keys_and_values, warps = 4 * 128 * attention_triton.KEYS, attention_triton.OPTIONS["num_warps"]  # in bytes
        for tokens in args.tokens:
            built, _ = compile_attention(capability, tokens, torch.float16)
            what = {"capability": capability, "dtype": "float16", "tokens": tokens, "kernel": "attention"}
            say(**what, **count(capability, built, keys_and_values, warps))
    cards = {card: {"memory_gb_per_second": memory} for card, (_, _, _, memory) in CARDS.items()}
    record("sass", args, {"triton": importlib.metadata.version("triton"), "cards": cards}, rows=rows)
