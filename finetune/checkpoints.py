"""The files of fine-tuning: base weights by the code of this repository, prefixes of P-Tuning v2, LoRA adapters.

A prefix is stored as the original stored it: `pytorch_model.bin` with the keys `transformer.prefix_encoder.*` alone.
Its length, and whether an MLP makes it, are read from the shapes of its tensors.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CODE = Path(__file__).resolve().parent.parent
PREFIX_FILE, PREFIX = "pytorch_model.bin", "transformer.prefix_encoder."


def code(reference):
    return get_class_from_dynamic_module(reference, str(CODE))


def check_folder(folder):
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder with config.json, weights, tokenizer.model.")


def load_config(folder):
    check_folder(folder)
    return code("configuration_chatglm.ChatGLMConfig").from_pretrained(folder)


def load_tokenizer(folder):
    """The tokenizer of the weights in `folder`, with this repository's chat template where the folder has none."""
    check_folder(folder)
    tokenizer = code("tokenization_chatglm.ChatGLMTokenizer").from_pretrained(folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (CODE / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def load_model(folder, dtype, bits=0, **config_changes):
    """The weights in `folder` in `dtype`; with `bits` 4 or 8 they are quantized while they load."""
    cls = code("modeling_chatglm.ChatGLMForConditionalGeneration")
    config = load_config(folder)
    config.update(config_changes)
    quantization = {"quantization_config": {"quant_method": "chatglm", "bits": bits}} if bits else {}
    return cls.from_pretrained(folder, config=config, torch_dtype=dtype, **quantization)


def take_code_along(model, tokenizer):
    """Let save_pretrained write the code beside the weights, so that the new folder stands alone."""
    type(model).register_for_auto_class("AutoModel")
    type(tokenizer).register_for_auto_class("AutoTokenizer")
    model.config.auto_map = json.loads((CODE / "config.json").read_text(encoding="utf-8"))["auto_map"]


def save_prefix(model, folder, state_dict=None):
    """Write the prefix of `model`; `state_dict` is the model's, where a distributed run has gathered it."""
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
    path = Path(folder) / PREFIX_FILE
    if path.is_file():
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    elif (path := path.with_name("model.safetensors")).is_file():  # the original's Trainer from transformers 4.35 on
        tensors = load_file(path)
    else:
        raise ValueError(f"{folder} holds neither {PREFIX_FILE} nor model.safetensors: give what training wrote.")
    state = {name[len(PREFIX) :]: value for name, value in tensors.items() if name.startswith(PREFIX)}
    if "embedding.weight" not in state:
        raise ValueError(f"{path} holds no {PREFIX}embedding.weight: give a P-Tuning checkpoint.")
    projected = any(name.startswith("trans.") for name in state)
    return state, {"pre_seq_len": len(state["embedding.weight"]), "prefix_projection": projected}


def load_finetuned(folder, checkpoint, dtype, bits=0):
    """The weights in `folder` with the LoRA adapter or the prefix that was trained on them."""
    if (Path(checkpoint) / "adapter_config.json").is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(load_model(folder, dtype, bits), checkpoint)
    state, config = read_prefix(checkpoint)
    model = load_model(folder, dtype, bits, **config)
    model.transformer.prefix_encoder.load_state_dict(state)
    return model
