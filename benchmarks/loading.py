"""Peak memory of loading a 12.5 GB float16 checkpoint to int4 or int8 on the CPU, each weight rounded as it comes in.

    python benchmarks/loading.py [--bits 4] [--folder FOLDER]    makes the checkpoint, of random numbers, in FOLDER once

Prints the peaks of the process's resident memory, of which files mapped into memory are a part, and adds one JSON line
to results/loading.jsonl.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
package = importlib.util.module_from_spec(importlib.util.spec_from_loader("chatglm2", loader=None, is_package=True))
package.__path__ = [str(ROOT)]
sys.modules["chatglm2"] = package

import torch  # noqa: E402
import transformers  # noqa: E402
from chatglm2.configuration_chatglm import ChatGLMConfig  # noqa: E402
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration  # noqa: E402
from chatglm2.quantization_loading import ChatGLMQuantizationConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def write_checkpoint(folder):
    """Seven shards of random float16 numbers, named and shaped as the released ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    config = ChatGLMConfig(torch_dtype="float16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ChatGLMForConditionalGeneration(config).state_dict().items()}
    shards, size, part = [], 0, {}
    for name, shape in shapes.items():
        part[name] = shape
        size += 2 * shape.numel()
        if size > 1.8e9:
            shards, size, part = [*shards, part], 0, {}
    shards.append(part)
    index = {}
    for i, part in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: (torch.randn(shape) * 0.02).half() for name, shape in part.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update({name: file for name in part})
    total = sum(2 * shape.numel() for shape in shapes.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config.save_pretrained(folder)


def resident(key):
    """A line of /proc/self/status, in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e9


def load(folder, bits):
    before, begin = resident("VmHWM"), time.perf_counter()
    config = ChatGLMQuantizationConfig(bits) if bits else None
    name = "dtype" if "dtype" in json.loads((folder / "config.json").read_text()) else "torch_dtype"
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, quantization_config=config, **{name: torch.float16})
    seconds, peak = time.perf_counter() - begin, resident("VmHWM")
    sizes = {
        "anonymous_gb": resident("RssAnon"),
        "mapped_gb": resident("RssFile"),
        "model_gb": model.get_memory_footprint() / 1e9,
    }
    with torch.inference_mode():
        model(torch.tensor([[5, 6, 7]]))
    sizes["peak_with_a_forward_gb"] = resident("VmHWM")
    return {"bits": bits, "peak_gb": peak, "before_gb": before, "seconds": seconds, **sizes}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=[0, 4, 8])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "chatglm2_random_float16"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(load(arguments.folder, arguments.bits)))
        return
    if not (arguments.folder / "config.json").exists():
        write_checkpoint(arguments.folder)
    command = [sys.executable, __file__, "--child", "--bits", str(arguments.bits), "--folder", str(arguments.folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    record = {key: round(value, 2) for key, value in json.loads(output.splitlines()[-1]).items()}
    record.update(torch=torch.__version__, transformers=transformers.__version__)
    print(record)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    with open(results / "loading.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
