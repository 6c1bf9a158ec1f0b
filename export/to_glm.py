#!/usr/bin/env python3
"""Write a ChatGLM2 checkpoint as transformers' own GlmForCausalLM: the same weights, and no remote code.

    python export/to_glm.py chatglm2-6b chatglm2-6b-glm

TARGET then holds what any tool that supports GLM reads: config.json, safetensors, tokenizer.json, the chat template.
int8 and int4 weights stay what they are, in a format of compressed-tensors, which vLLM reads; `--format float`
dequantizes them. What GLM cannot express is refused.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.transformers_compat import DTYPE  # noqa: E402
from checkpoints import load_config, load_tokenizer
from compressed_weights import choose_format, glm_tensors, quantization_config
from glm import empty_glm, glm_config, tokenizer_refusals

SHARD = "2GB"  # what is held in memory at a time


# ---- the tokenizer --------------------------------------------------------------------------------------------------

# [gMASK] and sop are named by Unicode noncharacters, so that no text contains them. Only at the start of a text, where
# the chat template has "[gMASK]sop", are they read.
GMASK, SOP = "\ufdd0", "\ufdd1"
PREFIX = "[gMASK]sop"


def glm_tokenizer(tokenizer, template):
    """A standard fast tokenizer with the ids of `tokenizer`, a ChatGLMTokenizer.

    Two differences: a text that begins with "[gMASK]sop" begins with these two ids, which is how a rendered chat
    template gets them, and decode() shows <unk>, <s> and </s> unless skip_special_tokens=True.
    """
    pieces, commands = tokenizer.tokenizer.sp_model, tokenizer.tokenizer.special_tokens
    vocab = tokenizer.tokenizer.get_vocab()
    text = {piece: i for piece, i in vocab.items() if tokenizer.tokenizer.is_text(i) and not pieces.IsByte(i)}
    merges = generate_merges(text, {piece: pieces.GetScore(i) for piece, i in text.items()})
    vocab = {{"[gMASK]": GMASK, "sop": SOP}.get(name, name): i for name, i in vocab.items()}

    fast = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"[{GMASK}{SOP}]"), "\ufffd"),
            normalizers.Prepend("▁"),
            normalizers.Replace(Regex(r"\A▁\[gMASK\]sop"), f"{GMASK}{SOP}▁"),
            normalizers.Replace(" ", "▁"),
        ]
    )
    prefix = [(GMASK, commands["[gMASK]"]), (SOP, commands["sop"])]
    fast.post_processor = TemplateProcessing(
        single=[GMASK, SOP, "$A"],
        pair=[GMASK, SOP, "$A", "$B", "</s>"],
        special_tokens=[*prefix, ("</s>", vocab["</s>"])],
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(rf"\A({GMASK}|{SOP}|\[MASK\]|\[sMASK\]|eop)\z"), ""),
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="left",
        split_special_tokens=True,  # "</s>" in a text stays text
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=tokenizer.model_max_length,
        chat_template=PREFIX + template,
    )


# ---- the folder -----------------------------------------------------------------------------------------------------


def load(source, form):
    """(model, tokenizer, format of its weights) of the folder `source`; the weights stay memory-mapped."""
    config = load_config(source)
    glm_config(config)  # refuses what cannot be written, before any weight is read
    form = choose_format(config, form)
    tokenizer = load_tokenizer(source)
    if problems := tokenizer_refusals(tokenizer):
        raise ValueError("\n".join(problems))
    model, report = ChatGLMForConditionalGeneration.from_pretrained(
        source, config=config, torch_dtype="auto", output_loading_info=True
    )
    if report["unexpected_keys"]:
        raise ValueError(f"{source} holds tensors that GLM does not have: {sorted(report['unexpected_keys'])[:3]}")
    return model.eval(), tokenizer, form


def write_model(model, target, form="float", max_shard_size=SHARD):
    """Write `model` as GLM to the folder `target`: config.json and weights, in a format of `choose_format`."""
    glm, state = empty_glm(model.config), model.state_dict()
    empty = {name: tensor.to("meta") for name, tensor in state.items()}
    outline, source = {}, {}
    for name in glm.state_dict():
        parts = glm_tensors(name, model.config, empty, form)
        outline.update(parts)
        source.update(dict.fromkeys(parts, name))
    plan = split_torch_state_dict_into_shards(outline, max_shard_size=max_shard_size)
    for file, parts in plan.filename_to_tensors.items():
        tensors = {}
        for name in dict.fromkeys(source[part] for part in parts):
            tensors.update(glm_tensors(name, model.config, state, form))
        save_file({part: tensors[part].contiguous() for part in parts}, target / file, metadata={"format": "pt"})
        del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    setattr(glm.config, DTYPE, model.dtype)
    if form != "float":
        linear = [name for name, layer in glm.named_modules() if isinstance(layer, torch.nn.Linear)]
        floats = [name for name in linear if f"{name}.weight_scale" not in outline]
        glm.config.quantization_config = quantization_config(model.config, form, floats)
    glm.config.save_pretrained(target)


def export(source, target, max_shard_size=SHARD, form=None):
    """Write the checkpoint `source` as a GLM folder `target`, in its dtype.

    form: of int8 and int4 weights, "int-quantized", "pack-quantized" or "float"; by default the first that vLLM runs
        on a CPU and on GPUs: int-quantized for int8, pack-quantized for int4.

    Raises:
        ValueError: GLM or `form` cannot express the model, tensors are missing, or `target` holds files already.
    """
    source, target = Path(source), Path(target)
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty. Give a new folder; nothing is overwritten.")
    model, tokenizer, form = load(source, form)
    target.mkdir(parents=True, exist_ok=True)
    write_model(model, target, form, max_shard_size)
    model.generation_config.save_pretrained(target)
    glm_tokenizer(tokenizer, tokenizer.chat_template).save_pretrained(target)
    settings = target / "tokenizer_config.json"
    values = json.loads(settings.read_text(encoding="utf-8"))
    values["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every release of transformers knows
    settings.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("MODEL_LICENSE", "LICENSE"):
        if (source / name).is_file():
            shutil.copy(source / name, target)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder with ChatGLM2 weights, config.json and tokenizer.model")
    parser.add_argument("target", help="a new folder")
    parser.add_argument(
        "--format",
        choices=["int-quantized", "pack-quantized", "float"],
        help="of int8 and int4 weights (default: pack-quantized for int4, and for int8 int-quantized, with which the "
        "activations, too, are rounded to int8)",
    )
    parser.add_argument("--max-shard-size", default=SHARD, help=f"of a safetensors file (default: {SHARD})")
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        export(args.source, args.target, args.max_shard_size, args.format)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{args.source}: {error}") from None
    print(f"{args.target}: " + ", ".join(sorted(path.name for path in Path(args.target).iterdir())))


if __name__ == "__main__":
    main()
