#!/usr/bin/env python3
"""Write a ChatGLM2 checkpoint as transformers' own GlmForCausalLM: the same weights, and no remote code.

    python export/to_glm.py chatglm2-6b chatglm2-6b-glm

TARGET then holds what every tool that knows GLM reads: config.json, safetensors, tokenizer.json, the chat template.
int8 and int4 checkpoints are written as the floats that their weights stand for. What GLM cannot express is refused.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

CODE = Path(__file__).resolve().parent.parent
SHARD = "2GB"  # what is held in memory at a time


def code(reference):
    """A class or function of this repository, as "modeling_chatglm.ChatGLMModel"."""
    return get_class_from_dynamic_module(reference, str(CODE))


def check_source(source):
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json. Give the folder that holds the weights and tokenizer.model.")


def chat_template(source):
    """Text of the folder's chat template, or of this repository's where the folder has none."""
    path = source / "chat_template.jinja"
    return (path if path.is_file() else CODE / path.name).read_text(encoding="utf-8")


# ---- the network ----------------------------------------------------------------------------------------------------

NAMES = {  # of the modules, GLM's and ours; q_proj, k_proj and v_proj are rows of the one query_key_value
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "model.layers": "transformer.encoder.layers",
    "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense",
    "self_attn.q_proj": "self_attention.query_key_value",
    "self_attn.k_proj": "self_attention.query_key_value",
    "self_attn.v_proj": "self_attention.query_key_value",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def refusals(config):
    """What GLM cannot express of a ChatGLMConfig: a list of texts, each with the value and the cure."""
    retrain = "only a model trained otherwise could be written"
    checks = [
        ("rmsnorm", True, f"GLM has RMSNorm alone: {retrain}"),
        ("post_layer_norm", True, f"GLM always has a last norm: {retrain}"),
        ("apply_residual_connection_post_layernorm", False, f"GLM takes the residual before the norm: {retrain}"),
        ("add_bias_linear", False, f"GLM has biases on query, key and value alone: {retrain}"),
        ("fp32_residual_connection", False, "GLM adds in the weights' dtype: set it to false if that is near enough"),
        ("pre_seq_len", None, "GLM has no P-Tuning prefix: export the model it was trained on, without pre_seq_len"),
    ]
    return [f"{k}={getattr(config, k)}: {cure}." for k, allowed, cure in checks if getattr(config, k) != allowed]


def glm_config(config):
    """GlmConfig of the network that the ChatGLMConfig `config` describes.

    Raises:
        ValueError: GLM cannot express it; the message names each value and its cure.
    """
    if problems := refusals(config):
        raise ValueError("\n".join(problems))
    linear = config.rope_ratio_type == "linear" and config.rope_ratio != 1
    return GlmConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.kv_channels,
        rms_norm_eps=config.layernorm_epsilon,
        attention_bias=config.add_qkv_bias,
        attention_dropout=config.attention_dropout,
        rope_theta=10000.0 * (config.rope_ratio if config.rope_ratio_type == "base" else 1),
        rope_scaling={"rope_type": "linear", "factor": float(config.rope_ratio)} if linear else None,
        partial_rotary_factor=0.5,
        max_position_embeddings=config.seq_length,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        bos_token_id=None,
        eos_token_id=config.eos_token_id,
        architectures=["GlmForCausalLM"],
    )


def glm_tensor(name, config, get):
    """The tensor that GLM calls `name`. `get(name)` gives ours: a parameter, or what a quantized one stands for."""
    ours = name
    for glm, chatglm in NAMES.items():
        ours = ours.replace(glm, chatglm)
    tensor = get(ours)
    letter = name.rpartition("_proj")[0][-1:]
    if "query_key_value" not in ours:
        return tensor
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.kv_channels
    if config.multi_query_attention:
        parts = tensor.split([heads * size, groups * size, groups * size])
    else:  # rows interleaved per head: q, k, v of head 0, of head 1, ...
        parts = [part.flatten(0, 1) for part in tensor.unflatten(0, (heads, 3, size)).unbind(1)]
    return parts["qkv".index(letter)]


def dequantized(model):
    """name -> tensor of `model`, where an int8 or int4 weight is given as the float that it stands for."""
    state = model.state_dict()

    def get(name):
        scale = state.get(name + "_scale")
        if scale is None:
            return state[name]
        bits = model.get_submodule(name.rpartition(".")[0]).bits
        return code("quantization_format.dequantize_weight")(state[name], scale, bits)

    return get


def empty_glm(config):
    """GlmForCausalLM of a ChatGLMConfig, on the meta device."""
    with torch.device("meta"):
        return GlmForCausalLM(glm_config(config))


def glm_state_dict(model):
    """The model's tensors under GlmForCausalLM's names; those that are not quantized share memory with the model."""
    get = dequantized(model)
    return {name: glm_tensor(name, model.config, get) for name in empty_glm(model.config).state_dict()}


# ---- the tokenizer --------------------------------------------------------------------------------------------------

# [gMASK] and sop are named by characters that Unicode keeps for a program's own use, so that no text can spell them;
# only what a text begins with, as the chat template's does, is read as these two.
GMASK, SOP = "\ufdd0", "\ufdd1"
PREFIX = "[gMASK]sop"


def glm_tokenizer(tokenizer, template):
    """A stock fast tokenizer with the ids of our `tokenizer`, a ChatGLMTokenizer.

    Two differences: a text that begins with "[gMASK]sop" begins with these two ids, which is how a rendered chat
    template gets them, and <unk>, <s> and </s> are shown by decode() unless skip_special_tokens=True.
    """
    pieces, commands = tokenizer.tokenizer.sp_model, tokenizer.tokenizer.special_tokens
    vocab = tokenizer.tokenizer.get_vocab()
    text = {piece: i for piece, i in vocab.items() if tokenizer._is_text(i) and not pieces.IsByte(i)}
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


def load(source):
    """(model, tokenizer) of the folder `source` by the code of this repository; the weights stay mapped from disk."""
    model_class = code("modeling_chatglm.ChatGLMForConditionalGeneration")
    tokenizer_class = code("tokenization_chatglm.ChatGLMTokenizer")
    config = model_class.config_class.from_pretrained(source)
    glm_config(config)  # what cannot be written is said before anything is read
    model, report = model_class.from_pretrained(source, config=config, torch_dtype="auto", output_loading_info=True)
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        raise ValueError(f"{source} lacks {len(lacking)} tensors, or has them in another shape: {lacking[:3]}")
    if report["unexpected_keys"]:
        raise ValueError(f"{source} holds tensors that GLM has no place for: {sorted(report['unexpected_keys'])[:3]}")
    return model.eval(), tokenizer_class.from_pretrained(source)


def export(source, target, max_shard_size=SHARD):
    """Write the checkpoint `source` as a GLM folder `target`, in the dtype it has.

    Raises:
        ValueError: GLM cannot express the model, tensors are missing, or `target` holds files already.
    """
    source, target = Path(source), Path(target)
    check_source(source)
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty. Give a new folder: nothing is overwritten.")
    model, tokenizer = load(source)
    target.mkdir(parents=True, exist_ok=True)

    glm = empty_glm(model.config).to(model.dtype)
    get = dequantized(model)
    plan = split_torch_state_dict_into_shards(glm.state_dict(), max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: glm_tensor(name, model.config, get).to(model.dtype).contiguous() for name in names}
        save_file(tensors, target / file, metadata={"format": "pt"})
        del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    setattr(glm.config, "dtype" if hasattr(glm.config, "dtype") else "torch_dtype", model.dtype)
    glm.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    glm_tokenizer(tokenizer, chat_template(source)).save_pretrained(target)
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
    parser.add_argument("--max-shard-size", default=SHARD, help=f"of a safetensors file (default: {SHARD})")
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        export(args.source, args.target, args.max_shard_size)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{args.source}: {error}") from None
    print(f"{args.target}: " + ", ".join(sorted(path.name for path in Path(args.target).iterdir())))


if __name__ == "__main__":
    main()
