#!/usr/bin/env python3
"""llama.cpp's converter, which this script lets take int4 and int8 weights as they are.

    python gguf_converter.py LLAMA_CPP [arguments of convert_hf_to_gguf.py]

int4 becomes Q4_0 and int8 Q8_0, without a detour through floats: each block of 32 weights gets its row's (or its
group's) scale, and holds the same integers. Run by to_gguf.py.
"""

import sys
from pathlib import Path

import numpy as np

BLOCK = 32  # weights per scale in GGUF


def q4_0(weight, scale):
    """int4 [out, in / 2], the even column in the high nibble, as Q4_0: uint8 [out, in / 32 * 18].

    A block is its scale in float16 and 16 bytes: weight j + 8 in the low nibble of byte j, weight j + 16's in the high.
    scale: float [out], or [out, groups] where a group is a multiple of 32 weights.
    """
    packed = weight.view(np.uint8)
    values = np.stack((packed >> 4, packed & 15), axis=-1).reshape(len(packed), -1, BLOCK)
    values ^= 8  # from two's complement to an offset of 8
    return with_scales(values[..., : BLOCK // 2] | values[..., BLOCK // 2 :] << 4, scale)


def q8_0(weight, scale):
    """int8 [out, in] as Q8_0: uint8 [out, in / 32 * 34]; a block is its scale in float16 and 32 weights."""
    return with_scales(weight.view(np.uint8).reshape(len(weight), -1, BLOCK), scale)


def with_scales(blocks, scale):
    """uint8 [out, blocks, bytes] and float [out] or [out, groups]: every block behind its scale, uint8 [out, bytes].

    Raises:
        ValueError: a scale is out of float16's range. Others are rounded to it; released ones are float16.
    """
    half = scale.reshape(len(blocks), -1).astype(np.float16)
    if not np.isfinite(half).all() or ((half == 0) & (scale.reshape(half.shape) != 0)).any():
        raise ValueError(f"scales from {abs(scale).min():g} to {abs(scale).max():g} are out of float16's range")
    half = np.repeat(half, blocks.shape[1] // half.shape[1], axis=1)
    return np.concatenate((half[..., None].view(np.uint8), blocks), axis=-1).reshape(len(blocks), -1)


def patch(model_class, gguf, eager):
    """Let the converter's `model_class` write quantized tensors itself, and convert the others as before."""
    dequantize, prepare = model_class.dequant_model, model_class.prepare_tensors

    def dequant_model(self):
        self.quantized = None
        for name in [name for name in self.model_tensors if name.endswith(".weight_scale")]:
            weight, scale = (eager(self.model_tensors.pop(key)()) for key in (name.removesuffix("_scale"), name))
            bits = self.hparams["quantization_bit"] if "layers." in name else 8
            encode, kind = (q4_0, "Q4_0") if bits == 4 else (q8_0, "Q8_0")
            data = encode(weight.numpy(), scale.float().numpy())
            new_name, dtype = self.map_tensor_name(name.removesuffix("_scale")), gguf.GGMLQuantizationType[kind]
            self.gguf_writer.add_tensor(new_name, data, raw_dtype=dtype)
            self.quantized = self.quantized or gguf.LlamaFileType["MOSTLY_" + kind]
        dequantize(self)

    def prepare_tensors(self):
        prepare(self)
        self.ftype = self.quantized or self.ftype  # what the file says that it holds

    model_class.dequant_model, model_class.prepare_tensors = dequant_model, prepare_tensors


def main():
    llama_cpp = Path(sys.argv.pop(1))
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import convert_hf_to_gguf
    import gguf
    from conversion.base import LazyTorchTensor
    from conversion.chatglm import ChatGLMModel

    patch(ChatGLMModel, gguf, LazyTorchTensor.to_eager)
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
