"""Folders of weights, of LoRA adapters and of P-Tuning prefixes, loaded by the code of this checkout.

A prefix is stored as the original stored it: `pytorch_model.bin` with the keys `transformer.prefix_encoder.*` alone.
Its length, and whether an MLP makes it, are read from the shapes of its tensors.
"""

import json
import sys
from pathlib import Path

import torch
from chatglm2.checkpoint_chatglm import read_json, read_tensors
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.quantization import QuantizedLinear, choose
from chatglm2.quantization_cpu import load_library
from chatglm2.quantization_loading import lay_out
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from chatglm2.transformers_compat import VERSION
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny"
TINY3 = ROOT / "examples" / "tiny3"  # a ChatGLM3
PREFIX_FILE, PREFIX = "pytorch_model.bin", "transformer.prefix_encoder."


def load_config(folder):
    """The config in `folder`. Raises ValueError if it is not a folder of weights."""
    if not (Path(folder) / "config.json").is_file():
        what = "has no config.json" if Path(folder).is_dir() else "is not a directory"
        raise ValueError(f"{folder} {what}: give the folder with config.json, weights and tokenizer.model.")
    for path in Path(folder).glob("*config.json"):  # the tokenizer's, too
        read_json(path)
    return ChatGLMConfig.from_pretrained(folder)


def load_tokenizer(folder):
    """The tokenizer in `folder`, with the chat template of this repository if the folder has none."""
    load_config(folder)
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    if getattr(tokenizer, "chat_template", None) is None:
        tokenizer.chat_template = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def load_model(folder, dtype, bits=0, checkpoint=None, head=False, **config_changes):
    """The weights in `folder` in `dtype`, quantized to `bits` while they load.

    `checkpoint` is the folder of a LoRA adapter or of a prefix that was trained on these weights. `head`: quantize
    embedding and output layer, too, to int8.
    """
    adapter = checkpoint and (Path(checkpoint) / "adapter_config.json").is_file()
    prefix = None
    if checkpoint and not adapter:
        prefix, config_changes = read_prefix(checkpoint)
    config = load_config(folder)
    config.update(config_changes)
    early = bits and VERSION >= (4, 55)  # earlier releases quantize afterwards; delete with 4.54
    chosen = {"bits": bits, "embedding": head, "output_layer": head}
    options = {"quantization_config": {"quant_method": "chatglm", **chosen}} if early else {}
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, config=config, torch_dtype=dtype, **options)
    if not early:
        model.quantize(**chosen)
        lay_out(model)
    if prefix:
        model.transformer.prefix_encoder.load_state_dict(prefix)
    if adapter:
        from peft import PeftModel

        for path in sorted(Path(checkpoint).glob("adapter_model.*")):
            read_tensors(str(path))  # names a damaged file
        return PeftModel.from_pretrained(model, checkpoint)
    return model


def held_in(model):
    """What the weights are held in and who multiplies by them: "int4 (AVX512-VNNI kernels), float16 elsewhere"."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    dtype = str(model.dtype).replace("torch.", "")
    if not layers:
        return dtype
    kinds = dict.fromkeys((layer.bits, choose(layer.backend, layer.weight.device)) for layer in layers)
    return ", ".join([*(f"int{bits} ({kernels(name)})" for bits, name in kinds), f"{dtype} elsewhere"])


def kernels(name):
    """The kernel family `name` in words."""
    if name == "cpu":
        return {"avx512": "AVX512-VNNI kernels", "avx2": "AVX2 kernels"}[load_library()[0].instructions]
    others = {"triton": "Triton kernels", "cpm": "CUDA C kernels", "stock": "torch's own operators"}
    return others.get(name, "plain torch")


def check_new(folder, option=""):
    """Raise ValueError if there is something at `folder`, which `option` names as the place to write files to."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{option}{folder} exists: give a new folder, or an empty one.")


def save(model, tokenizer, folder):
    """Write weights, tokenizer and code to `folder`, which then needs nothing else. It is there once it is whole."""
    partial = Path(f"{folder}.partial")
    size = sum(tensor.nbytes for tensor in model.parameters())
    if sys.stderr.isatty():
        print(f"Saving {size / 1e9:.1f} GB to {folder} ...", file=sys.stderr)
    include_code(model, tokenizer)
    model.save_pretrained(partial, max_shard_size="1GB", safe_serialization=True)
    tokenizer.save_pretrained(partial)
    partial.replace(folder)
    lay_out(model)  # saving has put the released packing back


def include_code(model, tokenizer):
    """Let save_pretrained write the code beside the weights, so that the new folder needs nothing else."""
    type(model).register_for_auto_class("AutoModel")
    type(tokenizer).register_for_auto_class("AutoTokenizer")
    model.config.auto_map = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))["auto_map"]


def save_prefix(model, folder, state_dict=None):
    """Write the prefix of `model`; `state_dict` is the model's, if a distributed run has gathered it."""
    if state_dict is None:
        state_dict = model.transformer.prefix_encoder.state_dict(prefix=PREFIX)
    prefix = {name: value.cpu() for name, value in state_dict.items() if name.startswith(PREFIX)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(prefix, Path(folder) / PREFIX_FILE)


def read_prefix(folder):
    """(the prefix encoder's state dict, its part of the config) of a checkpoint of this or of the original's script.

    Raises:
        ValueError: `folder` holds no prefix.
    """
    files = [Path(folder) / name for name in (PREFIX_FILE, "model.safetensors")]  # the second from 4.35 on
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        raise ValueError(f"{folder} holds neither {PREFIX_FILE} nor model.safetensors: give what training wrote.")
    read_tensors(str(path))  # names a damaged file
    bin_file = path.suffix == ".bin"
    tensors = torch.load(path, map_location="cpu", weights_only=True) if bin_file else load_file(path)
    state = {name[len(PREFIX) :]: value for name, value in tensors.items() if name.startswith(PREFIX)}
    if "embedding.weight" not in state:
        raise ValueError(f"{path} holds no {PREFIX}embedding.weight: give a P-Tuning checkpoint.")
    projected = any(name.startswith("trans.") for name in state)
    return state, {"pre_seq_len": len(state["embedding.weight"]), "prefix_projection": projected}
