#!/usr/bin/env python3
"""Write a float checkpoint as int4 or int8, in the released format, with tokenizer and code.

    python export/quantize.py chatglm2-6b chatglm2-6b-int4
    python export/quantize.py chatglm2-6b chatglm2-6b-int4 --calibration samples.jsonl

By default each weight is rounded to the nearest value, as the released int4 was made, one at a time while they load.
With --calibration the float model is in memory, and its layers keep what they compute on samples of that file: .jsonl
with {"messages": [{"role": ..., "content": ...}, ...]} a line, or any other text. It takes hours on a CPU: if it is
stopped, the same command goes on from the folder TARGET.progress.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from starting import importing

with importing():
    import torch
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm2.transformers_compat import DTYPE, as_dtype
    from checkpoints import check_new, load_config, load_model, load_tokenizer, save
    from options import Parser, choose_device, device, number
    from samples import read_samples
    from transformers.utils import logging


def check_room(config, dtype, bits, target, progress=None):
    """Raise OSError if the disk has no room for `target`, the model of this config in int4 or int8.

    progress: a folder that holds its layers for a second time, or will; what is there takes no more room.
    """
    config = type(config)(**{**config.to_dict(), "quantization_bit": bits})
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).to(dtype)
    folder = next(path for path in Path(target).resolve().parents if path.is_dir())
    needed, free = sum(tensor.nbytes for tensor in model.parameters()), shutil.disk_usage(folder).free
    if progress is not None:
        needed += max(needed - sum(path.stat().st_size for path in Path(progress).glob("*.pt")), 0)
    if free < 1.01 * needed:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB left, but the files take {needed / 1e9:.1f} GB: make room there"
        )


def export(source, target, bits=4, scale="max", calibration=None, samples=128, device="cpu"):
    """Write the checkpoint `source` to the new folder `target`, in int4 or int8 and otherwise in its dtype.

    Args:
        scale: as for `quantize`.
        calibration: a file that `read_samples` reads up to `samples` samples from; None rounds to the nearest.

    Raises ValueError or OSError before any weight is read, if something is in the way.
    """
    check_new(target)
    config, tokenizer = load_config(source), load_tokenizer(source)
    if config.quantization_bit:
        raise ValueError(f"{source} is int{config.quantization_bit} already: give the folder of the float weights.")
    options = {"scale": scale}
    if calibration is not None:
        options = {"calibration": read_samples(calibration, tokenizer, samples), "tokenizer": tokenizer}
        options["progress"] = f"{Path(target).resolve()}.progress"
    dtype = as_dtype(getattr(config, DTYPE, None)) or torch.float16
    check_room(config, dtype, bits, target, options.get("progress"))
    if options == {"scale": "max"}:
        model = load_model(source, dtype, bits)
    else:
        model = load_model(source, dtype).to(device).quantize(bits, **options)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, target)
    if calibration is not None:
        shutil.rmtree(options["progress"])


def main(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, lambda value: value >= 1, "1 or more")
    add("source", help="folder with float weights, config.json and tokenizer.model")
    add("target", help="a new folder")
    add("--bits", type=int, default=4, choices=[4, 8])
    add("--scale", default="max", choices=["max", "mse"], help="mse: search each row's scale for the least error")
    add("--calibration", metavar="FILE", help="a file of samples of what the model will read and write")
    add("--samples", type=count, default=128, help="how many of them are used (default: 128)")
    add("--device", type=device, default="auto", help="where to calibrate: auto, cpu, cuda, cuda:1 (default: auto)")
    args = parser.parse_args(arguments)
    if args.calibration and args.scale != "max":
        parser.error("--calibration searches its own scales: leave out --scale")
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        export(args.source, args.target, args.bits, args.scale, args.calibration, args.samples,
               choose_device(args.device))  # fmt: skip
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped." + " The same command goes on from here." * bool(args.calibration)) from None
    size = sum(path.stat().st_size for path in Path(args.target).glob("*.safetensors"))
    print(f"{args.target}: int{args.bits}, {size / 1e6:,.1f} MB of weights")


if __name__ == "__main__":
    main()
