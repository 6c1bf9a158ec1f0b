"""What the files of a checkpoint hold, read before the weights are: transformers loads much that cannot be right.

It casts int8 to float16, goes on with random values for what is missing, and reports a damaged file by whichever
library read it. Only headers are read here: under 0.1 s for 203 tensors in seven .bin files, 1 ms in safetensors.
"""

import json
import os
import re
from typing import NamedTuple

from transformers.utils import cached_file

from .quantization import LAYERS
from .quantization_loading import missing_quantized_weights_error
from .torch_compat import load_without_data

DOWNLOAD = "Download the file again."
LOCATION = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token", "use_auth_token")
OTHER_SOURCES = ("force_download", "from_flax", "from_tf", "gguf_file", "state_dict")  # weights that are not found here
ADDED = ("prefix_encoder.", "classifier_head.")  # what training adds to the released weights


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str  # "float16", "int8", ...
    shape: tuple
    path: str


def read_checkpoint(name, variant=None, use_safetensors=None, **options):
    """{tensor: Stored} of the weights that `from_pretrained(name, **options)` will load; {} if it finds none here.

    Raises:
        ValueError: a file is damaged, or missing from its index.
    """
    if name is None or any(options.get(key) for key in OTHER_SOURCES):
        return {}
    location = {key: options[key] for key in LOCATION if options.get(key) is not None}

    def find(file):
        try:
            return cached_file(name, file, **location)
        except (OSError, ValueError):  # transformers will say what is wrong with the name
            return None

    for path in map(find, ("config.json", "generation_config.json")):
        if path is not None:
            read_json(path)
    files = ["model.safetensors", "model.safetensors.index.json"] if use_safetensors is not False else []
    files += ["pytorch_model.bin", "pytorch_model.bin.index.json"] if not use_safetensors else []
    for file in files:
        stem, dot, kind = file.rpartition(".")
        path = find(f"{stem}.{variant}.{kind}" if variant else file)
        if path is not None:
            return read_index(path, find) if kind == "json" else read_tensors(path)
    return {}


def read_index(path, find):
    """{tensor: Stored} of the shards that an index names."""
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise ValueError(f"{path} has no weight_map of tensors to files. {DOWNLOAD}")
    shards = {shard: find(shard) for shard in sorted(set(names.values()))}
    absent = [shard for shard, found in shards.items() if found is None]
    if absent:
        raise ValueError(f"{path} names {shorten(absent)}, which cannot be found. Download the missing files.")
    return {name: tensor for shard in shards.values() for name, tensor in read_tensors(shard).items()}


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as error:
        raise damaged(path, f"is not valid JSON ({error})") from error


def read_tensors(path):
    """{tensor: Stored} of one file of weights."""
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    try:
        tensors = load_without_data(path)
    except Exception as error:  # of zip files, of pickle, of torch: none of them names the file
        raise damaged(path, "cannot be read as a file of tensors") from error
    return {name: Stored(str(t.dtype)[len("torch.") :], tuple(t.shape), path) for name, t in tensors.items()}


def read_safetensors(path):
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        begin = 8 + int.from_bytes(f.read(8), "little")
        try:
            header = json.loads(f.read(begin - 8)) if 8 < begin <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise damaged(path, "has no safetensors header")
    header.pop("__metadata__", None)
    end = begin + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size < end:
        raise damaged(path, f"should have {end:,} bytes")
    kinds = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}
    tensors = {}
    for name, tensor in header.items():
        kind, rest = re.fullmatch(r"([A-Z]+)(.*)", tensor["dtype"]).groups()
        tensors[name] = Stored(kinds.get(kind, kind.lower()) + rest.lower(), tuple(tensor["shape"]), path)
    return tensors


def damaged(path, what):
    """The ValueError about a file that is not what its name says."""
    with open(path, "rb") as f:
        pointer = f.read(20) == b"version https://git-"
    if pointer:
        cure = f"run `git lfs pull` in {os.path.dirname(path) or '.'}, or download the file."
        return ValueError(f"{path} is a Git LFS pointer in place of the file: {cure}")
    return ValueError(f"{path} has {os.path.getsize(path):,} bytes and {what}: it is incomplete or damaged. {DOWNLOAD}")


def shorten(names, limit=3):
    """The first of many names, and how many more there are."""
    names = sorted(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


# What the tensors are


def quantization_changes(tensors, config):
    """What has to change in `config` for the weights to be loaded as what they are; {} if nothing.

    int8 weights with scales say by themselves how they were quantized, so a config that lost it is completed.

    Raises:
        ValueError: a dtype that no weight has, or quantization_bit contradicts the weights.
    """
    if getattr(config, "quantization_config", None):  # other tensors, of another method
        return {}
    for name, tensor in tensors.items():
        check_dtype(name, tensor, tensors)
    scales = {name.rpartition(".")[0]: tensor for name, tensor in tensors.items() if name.endswith(".weight_scale")}
    asked = config.quantization_bit
    if not scales:
        if asked and tensors:
            raise missing_quantized_weights_error(asked, "float weights")
        return {}
    kind_of = {layer: layer.rpartition(".")[2] for layer in scales}
    found = {stored_bits(layer, tensors, config) for layer, kind in kind_of.items() if kind in LAYERS} or {8}
    bits = max(found)
    path = next(iter(scales.values())).path
    if len(found) > 1:
        raise ValueError(f"{path} has int8 and int4 layers. Quantize the float checkpoint again.")
    if asked not in (0, bits):
        raise ValueError(
            f"quantization_bit={asked}, but {path} has int{bits} weights: set quantization_bit to {bits}, or quantize "
            f"the float checkpoint to {asked} bits."
        )
    floats = [name.rpartition(".")[0] for name in tensors if name.endswith(".weight")]
    floats = [layer for layer in floats if layer.rpartition(".")[2] in LAYERS and layer not in scales]
    groups = [
        tensors[f"{layer}.weight"].shape[1] * 8 // bits // scale.shape[1]
        for layer, scale in scales.items()
        if kind_of[layer] in LAYERS and len(scale.shape) == 2
    ]
    options = {  # as quantization.quantize writes them to the config
        "group_size": groups[0] if groups else None,
        "skip": [layer[layer.find("encoder.") :] for layer in floats],
        "embedding": "word_embeddings" in kind_of.values(),
        "output_layer": "output_layer" in kind_of.values(),
    }
    options = {key: value for key, value in options.items() if value}
    changes = {"quantization_bit": bits, "quantization_options": options}
    return {key: value for key, value in changes.items() if getattr(config, key, None) != value}


def check_dtype(name, tensor, tensors):
    layer, _, kind = name.rpartition(".")
    if kind not in ("weight", "weight_scale", "bias"):
        return
    scaled = kind == "weight" and f"{layer}.weight_scale" in tensors
    if tensor.dtype == "int8" and kind == "weight" and not scaled:
        raise ValueError(f"{tensor.path}: {name} is int8, but there is no {layer}.weight_scale. {DOWNLOAD}")
    if tensor.dtype != "int8" if scaled else "float" not in tensor.dtype:
        wanted = f"int8, as its {layer}.weight_scale says" if scaled else "float32, float16 or bfloat16"
        raise ValueError(f"{tensor.path}: {name} is {tensor.dtype}. It must be {wanted}. Convert the weights again.")


def stored_bits(layer, tensors, config):
    """8 or 4, by the number of columns of an int8 weight."""
    heads = config.num_attention_heads * config.kv_channels
    inputs = {"dense": heads, "dense_4h_to_h": config.ffn_hidden_size}
    columns = inputs.get(layer.rpartition(".")[2], config.hidden_size)
    weight = tensors.get(f"{layer}.weight")
    if weight is None:
        raise ValueError(f"{tensors[f'{layer}.weight_scale'].path}: {layer}.weight is missing. {DOWNLOAD}")
    for bits in (8, 4):
        if len(weight.shape) == 2 and weight.shape[1] * 8 == columns * bits:
            return bits
    raise ValueError(
        f"{weight.path}: {layer}.weight is int8 {list(weight.shape)}, which is neither int8 nor int4 for the {columns} "
        "inputs of this config.json: it belongs to other weights."
    )


def check_names(folder, model, tensors, report):
    """Raise ValueError if the tensors of a checkpoint are not those of the model that was loaded from it.

    What training adds may be missing as a whole; it is initialized. Tensors outside the model do not matter.
    """
    names = {within_base(name): name for name, _ in model.named_parameters()}
    missing, unexpected = map(within_base, report["missing_keys"]), map(within_base, report["unexpected_keys"])
    adapted = getattr(model.config, "quantization_config", None) or any(".base_layer." in name for name in names)
    if tensors and not adapted:  # with low_cpu_mem_usage, releases before 4.48 report nothing
        stored = set(map(within_base, tensors))
        missing = {name for name in names if not name.endswith(".weight_scale")} - stored
        unexpected = stored - names.keys()
    missing = set(missing)
    for part in ADDED:
        added = {name for name in names if name.startswith(part)}
        if added <= missing:
            missing -= added
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the model's {len(names)} tensors: "
            f"{shorten(names.get(name, name) for name in missing)}. Give the folder of all weights (adapters and "
            "P-Tuning prefixes are loaded on top), or strict=False for random values."
        )
    parts = ("embedding.", "encoder.", "output_layer.", "prefix_encoder.")
    unknown = [name for name in unexpected if name.startswith(parts)]
    if unknown:
        raise ValueError(
            f"{folder} has {len(unknown)} tensors that the model of its config.json lacks: {shorten(unknown)}. Give "
            "the config.json of these weights, or strict=False to load without them."
        )


def check_shapes(model, tensors, error):
    """Raise RuntimeError from `error`, as transformers does, if tensors have other shapes than the empty `model`'s."""
    stored = {within_base(name): tensor for name, tensor in tensors.items()}
    for name, parameter in model.named_parameters():
        tensor = stored.get(within_base(name))
        if tensor is not None and tuple(tensor.shape) != tuple(parameter.shape):
            raise RuntimeError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, but by config.json {list(parameter.shape)}. "
                "Give the config.json of these weights, or ignore_mismatched_sizes=True for new values."
            ) from error


def within_base(name):
    """A tensor's name in ChatGLMModel, for all three classes."""
    prefix = "transformer."
    return name[len(prefix) :] if name.startswith(prefix) else name
