"""int8 and int4 weights as they are, under GLM's names, in two formats of the package compressed-tensors.

vLLM reads both, and transformers does if compressed-tensors is installed:

- pack-quantized: the integers of a row, shifted to unsigned, in int32; the first column in the lowest bits.
- int-quantized: int8 as it is, and activations that the program rounds to int8, per token, when it multiplies.

A row, or a group of its inputs, keeps its scale, in its dtype.
"""

import torch
from glm import dequantized, glm_tensor, our_name

FORMATS = {8: ("int-quantized", "pack-quantized"), 4: ("pack-quantized",)}  # the first runs on CPUs and on GPUs
MULTIPLE = 32  # of the sizes that vLLM's CPU kernel multiplies
GROUPS = (32, 64, 128)  # that vLLM's GPU kernels know


def choose_format(config, form=None):
    """`form`, or the default for a ChatGLMConfig: "float", or one of FORMATS.

    Raises:
        ValueError: the format, or vLLM's kernels, cannot take such weights; the message has each value and the cure.
    """
    bits, group = config.quantization_bit, config.quantization_options.get("group_size")
    forms = (*FORMATS.get(bits, ()), "float")
    form = form or forms[0]
    if form not in forms:
        raise ValueError(f"weights with quantization_bit={bits} cannot be written as {form}: give {', '.join(forms)}.")
    if form == "float":
        return form
    problems = []
    if group and form == "int-quantized":
        problems.append(f"group_size={group}: int-quantized has one scale per row. Give pack-quantized or float.")
    elif group and group not in GROUPS:
        problems.append(f"group_size={group}: vLLM multiplies groups of 32, 64 or 128. Give float.")
    sizes = {name: getattr(config, name) for name in ("hidden_size", "ffn_hidden_size")}
    sizes["kv_channels * num_key_value_heads"] = config.kv_channels * config.num_key_value_heads
    for name, size in sizes.items():
        if size % MULTIPLE:
            problems.append(f"{name}={size}: vLLM multiplies multiples of {MULTIPLE}. Give float.")
    if problems:
        raise ValueError("\n".join(problems))
    return form


def packed(weight, bits):
    """The released int8 [out, in * bits / 8] as int32 [out, in * bits / 32], the integers shifted to unsigned."""
    if bits == 4:  # the even column from the high nibble to the low one, and 8 added to both
        weight = (weight >> 4 & 15 | weight << 4) ^ -0x78
    else:
        weight = weight ^ -0x80
    return weight.contiguous().view(torch.int32)


def glm_tensors(name, config, state, form):
    """{name: tensor}: what stands for GlmForCausalLM's parameter `name`, made from the model's `state` dict.

    Float tensors, and those of a quantized embedding and output layer, which are restored, stand for themselves. Also
    for tensors on the meta device.
    """
    if form == "float" or our_name(name) + "_scale" not in state or not name.startswith("model.layers."):
        return {name: glm_tensor(name, config, dequantized(state, config.quantization_bit))}
    weight, scale = (glm_tensor(key, config, state.__getitem__) for key in (name, name + "_scale"))
    scale = scale.reshape(len(scale), -1).contiguous()
    if form == "int-quantized":
        return {name: weight.contiguous(), name + "_scale": scale}
    bits = config.quantization_bit
    shape = torch.tensor([len(weight), weight.shape[1] * 8 // bits])
    return {name + "_packed": packed(weight, bits), name + "_scale": scale, name + "_shape": shape}


def quantization_config(config, form, floats):
    """The `quantization_config` of config.json; `floats` names the linear layers that hold floats."""
    group = config.quantization_options.get("group_size")
    integers = {"type": "int", "symmetric": True}
    weights = {**integers, "num_bits": config.quantization_bit, "dynamic": False}
    weights.update(strategy="group" if group else "channel", group_size=group)
    inputs = {**integers, "num_bits": 8, "dynamic": True, "strategy": "token"} if form == "int-quantized" else None
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": floats,
    }
