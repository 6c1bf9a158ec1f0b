#!/usr/bin/env python3
"""Write a ChatGLM2 checkpoint as GGUF, by llama.cpp's own converter.

    git clone --depth 1 https://github.com/ggml-org/llama.cpp
    python export/to_gguf.py chatglm2-6b chatglm2-6b.gguf --llama-cpp llama.cpp

The converter recognizes a SentencePiece ChatGLM by the name of ChatGLM3's repository, and calls [gMASK] and sop [PADn],
as if they were padding. It is given a folder with that name, the code of this repository, and a chat template that
starts with the two. Then both are marked as control tokens, so that chats in llama.cpp have the model's own prompt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from checkpoints import ROOT, load_config, load_tokenizer
from gguf_converter import BLOCK
from glm import refusals, tokenizer_refusals

REPOSITORY = "THUDM/chatglm3-6b"
CONTROL = 3  # GGUF's type of tokens that only a template contains


def gguf_refusals(config):
    """What llama.cpp cannot express of a ChatGLMConfig, or its converter gets wrong."""
    problems = refusals(config)
    if not config.multi_query_attention:
        problems.append("multi_query_attention=False: the converter reads query, key and value in another order.")
    group_size = config.quantization_options.get("group_size")
    if group_size and group_size % BLOCK:
        problems.append(f"group_size={group_size}: GGUF has one scale for {BLOCK} weights. Use a multiple of {BLOCK}.")
    if config.quantization_bit and (config.hidden_size % BLOCK or config.ffn_hidden_size % BLOCK):
        problems.append(f"hidden_size and ffn_hidden_size must be multiples of {BLOCK} for quantized weights.")
    if config.kv_channels * config.num_attention_heads != config.hidden_size:
        problems.append(f"kv_channels={config.kv_channels}: the converter uses hidden_size / num_attention_heads.")
    return problems


def write_source(source, folder, config, template):
    """Fill `folder` with links to weights and code, and with the config that the converter looks for."""
    weights = [path for pattern in ("*.safetensors", "*.bin", "*.index.json") for path in source.glob(pattern)]
    for path in (*weights, source / "tokenizer.model", *ROOT.glob("*.py"), ROOT / "tokenizer_config.json"):
        (folder / path.name).symlink_to(path.resolve())
    auto_map = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))["auto_map"]
    values = {**config, "_name_or_path": REPOSITORY, "architectures": ["ChatGLMModel"], "auto_map": auto_map}
    values["model_family"] = "chatglm2"  # as the converter's tokens are numbered; the name above says otherwise
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def export(source, target, llama_cpp, outtype="auto"):
    """Write the folder `source` as the file `target`; `llama_cpp` is a folder of llama.cpp's source.

    Returns:
        Options that llama.cpp needs to run the file, for a linear rope_ratio, or "".

    Raises:
        ValueError: a folder is wrong, llama.cpp cannot express the model, or its converter failed.
    """
    source, target, llama_cpp = Path(source), Path(target), Path(llama_cpp)
    converter = llama_cpp / "convert_hf_to_gguf.py"
    if not converter.is_file():
        raise ValueError(f"{llama_cpp} has no {converter.name}. Give --llama-cpp the folder of llama.cpp's source.")
    config = load_config(source)
    if target.exists():
        raise ValueError(f"{target} already exists; nothing is overwritten.")
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if problems := gguf_refusals(config):
        raise ValueError("\n".join(problems))
    tokenizer = load_tokenizer(source)
    if problems := tokenizer_refusals(tokenizer):
        raise ValueError("\n".join(problems))
    options = ""
    if config.rope_ratio_type == "linear" and config.rope_ratio != 1:  # the converter would read it as "base"
        options = f"--rope-scaling linear --rope-scale {config.rope_ratio:g}"
        values["rope_ratio"] = 1
    prefix_ids = tokenizer.get_prefix_tokens()
    template = "".join(f"[PAD{i}]" for i in prefix_ids) + tokenizer.chat_template

    unfinished = target.with_name(target.name + ".unfinished")
    with tempfile.TemporaryDirectory() as folder:
        write_source(source, Path(folder), values, template)
        if config.quantization_bit and outtype == "auto":
            outtype = "f16"  # of what is not quantized
        command = [sys.executable, str(Path(__file__).with_name("gguf_converter.py")), str(llama_cpp)]
        command += [folder, "--outfile", str(unfinished), "--outtype", outtype]
        done = subprocess.run([*command, "--model-name", source.resolve().name], capture_output=True, text=True)
    if done.returncode or not unfinished.is_file():
        raise ValueError(f"{converter.name} failed:\n{done.stderr[-2000:]}")
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    from gguf import GGUFReader

    types = GGUFReader(unfinished, "r+").get_field("tokenizer.ggml.token_type")
    for i in prefix_ids:
        types.parts[types.data[i]][0] = CONTROL
    unfinished.rename(target)
    return options


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder with ChatGLM2 weights, config.json and tokenizer.model")
    parser.add_argument("target", help="a new file")
    parser.add_argument("--llama-cpp", required=True, help="folder of llama.cpp's source")
    parser.add_argument(
        "--outtype",
        default="auto",
        help="f32, f16, bf16, q8_0, ... of float weights (default: theirs); int4 becomes Q4_0, int8 Q8_0",
    )
    args = parser.parse_args(arguments)
    try:
        options = export(args.source, args.target, args.llama_cpp, args.outtype)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{args.source}: {error}") from None
    print(f"{args.target}: {Path(args.target).stat().st_size / 1e6:.1f} MB")
    if options:
        print(f"rope_ratio is not in the file; run it with {options}")


if __name__ == "__main__":
    main()
