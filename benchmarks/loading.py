"""Peak memory of loading a 12.5 GB float16 checkpoint on the CPU, as it is or quantized while it loads.

The checkpoint, of random numbers, is written to --folder once. Peaks are resident memory of the process, with the files
that are mapped (Linux).
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine, random_filler, record, resident_bytes

OUTPUT = "transformer.output_layer.weight"


def arguments(parser):
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=[0, 4, 8], help="0: float16 as it is")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "chatglm2_random_float16"))
    parser.add_argument("--threads", type=int)


def write_checkpoint(folder, bits=0):
    """Shards of random weights, named and shaped as the released ones are: float16, or int8 or int4 with its scales."""
    from chatglm2.configuration_chatglm import ChatGLMConfig
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = ChatGLMConfig(torch_dtype="float16", quantization_bit=bits)
    with torch.device("meta"):
        empty = ChatGLMForConditionalGeneration(config).half().state_dict()
    shards, size, part = [], 0, {}
    for name, tensor in empty.items():
        part[name] = tensor
        size += tensor.nbytes
        if size > 1.8e9:
            shards, size, part = [*shards, part], 0, {}
    shards.append(part)
    index, fill = {}, random_filler(bits)
    for i, part in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: fill(name, torch.empty_like(tensor, device="cpu")) for name, tensor in part.items()}
        if OUTPUT in tensors:
            tensors[OUTPUT][:1000] = tensors[OUTPUT][1256:] = 0  # so that greedy decoding yields printable tokens
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update({name: file for name in part})
    total = sum(tensor.nbytes for tensor in empty.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config.save_pretrained(folder)


def load(folder, bits):
    """Gigabytes and seconds of one load, in a process that has done nothing else."""
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm2.quantization_loading import ChatGLMQuantizationConfig

    before, begin = resident_bytes("VmHWM"), time.perf_counter()
    config = ChatGLMQuantizationConfig(bits) if bits else None
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, quantization_config=config, dtype=torch.float16)
    seconds, peak = time.perf_counter() - begin, resident_bytes("VmHWM")
    sizes = {"anonymous": resident_bytes("RssAnon"), "mapped": resident_bytes("RssFile")}
    with torch.inference_mode():
        model(torch.tensor([[5, 6, 7]]))
    sizes.update(model=model.get_memory_footprint(), peak=peak, before=before)
    sizes["peak_with_a_forward"] = resident_bytes("VmHWM")
    return {"bits": bits, "seconds": round(seconds, 1), **{f"{key}_gb": round(x / 1e9, 2) for key, x in sizes.items()}}


def run(args):
    if not (args.folder / "config.json").exists():
        write_checkpoint(args.folder)
    limits, rows = machine(torch.float16), []
    for bits in args.bits:
        command = [sys.executable, __file__, str(args.folder), str(bits)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    args.folder = None
    record("loading", args, limits, rows=rows)


if __name__ == "__main__":  # the process that loads
    print(json.dumps(load(sys.argv[1], int(sys.argv[2]))))
