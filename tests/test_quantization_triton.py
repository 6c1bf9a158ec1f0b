"""quantization_triton without a GPU: the kernels run in Triton's interpreter and compile for several capabilities.

The interpreter runs in a subprocess, which is this file as a program.
"""

import contextlib
import json
import re
import sys
import types

import pytest
import torch
from chatglm2 import quantization_triton
from quantization_helpers import CUDA, FLOAT32_SUM, HALF_ULP, error, make
from triton_compile import compile_triton
from triton_helpers import multiply_bfloat16, needs_triton, run_in_the_interpreter

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# ---- values, in the interpreter -------------------------------------------------------------------------------------

# name -> (rows, columns, out); a case's shape goes on with bits, dtype, group_size, bias
SHAPES = {
    "one row": (1, 416, 21),
    "one row, columns beyond a block": (1, 1536, 9),
    "three rows": (3, 416, 37),
    "sixteen rows": (16, 224, 33),
    "seventeen rows": (17, 224, 33),
    "odd everything": (70, 90, 71),
}
CASES = {
    f"int{bits} {str(dtype)[6:]} {name}{' groups of ' + str(group) if group else ''}": dict(
        shape=(*shape, bits, str(dtype)[6:], group, bias)
    )
    for bits in (4, 8)
    for dtype in DTYPES
    for name, shape in SHAPES.items()
    for group, bias in ((None, True), (32, False))
    if shape[1] % (group or 1) == 0 and (dtype == torch.bfloat16 or "sixteen" not in name)
}
CASES |= {
    f"int4 groups of {group}, {rows} rows": dict(shape=(rows, 384, 18, 4, "float16", group, True))
    for group in (2, 96, 384)
    for rows in (1, 2, 20)
}
CASES["more rows than are fused"] = dict(shape=(300, 32, 70, 4, "float16", None, True))
CASES["more rows than are fused, groups of 32, int8"] = dict(shape=(300, 64, 70, 8, "bfloat16", 32, True))
TILES = {  # tiles not in use, which `benchmarks gpu --only tune` may find to be faster
    "skinny": (7, [(8, 16, 128, 4, 4, 3), (16, 64, 32, 2, 2, 2), (8, 64, 64, 8, 8, 3), (8, 16, 256, 1, 1, 2)]),
    "tile": (40, [(32, 64, 64, 1, 4, 3), (64, 32, 128, 1, 4, 3), (128, 128, 32, 1, 8, 3)]),
}
CASES |= {
    f"int{bits}, {kernel} in tiles of {tile}": dict(shape=(rows, 576, 70, bits, "float16", group, True), tile=tile)
    for kernel, (rows, tiles) in TILES.items()
    for tile in tiles
    for bits, group in ((4, 64), (8, None))
}


def tolerance(name):
    """The limit for `error`: that of float32 sums, and of weights rounded to x's dtype before the product.

    Grouped weights in half precision are rounded, and those that torch multiplies; the interpreter truncates bfloat16.
    """
    rows, _, _, _, dtype, group, _ = CASES[name]["shape"]
    rounded = dtype != "float32" and (group or rows > quantization_triton.FUSED_ROWS) or dtype == "float32" and rows > 1
    return FLOAT32_SUM + (2 * HALF_ULP[getattr(torch, dtype)] if rounded else 0)


def interpret() -> dict:
    """Return {case: error} and results of edge cases. Runs with TRITON_INTERPRET=1."""
    multiply_bfloat16()
    results = {}
    quantization_triton.multiply_two_weights(torch.device("cpu"))
    tile_for = quantization_triton.tile_for
    for name, case in CASES.items():
        tile = case.get("tile")
        chosen = tile_for if tile is None else lambda *_, tile=tile: quantization_triton.Tile(*tile)
        quantization_triton.tile_for = chosen
        quantization_triton.plan.cache_clear()
        rows, columns, out, bits, dtype, group, bias = case["shape"]
        arguments = make(rows, columns, out, bits, getattr(torch, dtype), group, bias)
        y = quantization_triton.linear(*arguments)
        assert y.dtype == arguments[0].dtype and y.shape == (rows, out)
        results[name] = error(y, *arguments, ulps=1 if y.dtype == torch.bfloat16 else 0.5)  # it truncates bfloat16
    x, weight, scale, bias, bits = make(3, 64, 5, 4, torch.float16)
    results["no rows"] = list(quantization_triton.linear(x[:0], weight, scale, bias, bits).shape)
    flat = torch.cat([x.flatten()[:1], x.flatten()])
    shifted = flat[1:].view(3, 64)  # contiguous, yet its pairs of columns are not aligned
    y = quantization_triton.linear(shifted, weight, scale, bias, bits)
    results["odd offset"] = error(y, x, weight, scale, bias, bits)
    huge = quantization_triton.linear(x.float() * 1e30, weight, scale.float(), None, bits)
    results["huge"] = error(huge, x.float() * 1e30, weight, scale.float(), None, bits)
    results["other dtypes of scale and bias"] = error(
        quantization_triton.linear(x, weight, scale.float(), bias.float(), bits), x, weight, scale, bias, bits
    )
    return results


@pytest.fixture(scope="module")
def interpreted():
    return run_in_the_interpreter(__file__)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_values_in_the_interpreter(interpreted, name):
    assert interpreted[name] < tolerance(name)


@needs_triton
def test_edge_cases_in_the_interpreter(interpreted):
    assert interpreted["no rows"] == [0, 5]
    for name in ("odd offset", "other dtypes of scale and bias", "huge"):
        assert interpreted[name] < FLOAT32_SUM


# ---- machine code, compiled ahead of time ---------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("capability", (75, 80, 90, 120))
def test_kernels_compile_for_each_capability(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, rows, bits, dtype, group in (
        ("matvec", 1, 4, torch.float32, 0),
        ("skinny", 1, 4, torch.float16, 0),
        ("skinny", 16, 8, torch.bfloat16, 32),
        ("tile", 100, 4, torch.bfloat16, 0),
    ):
        if capability < 80 and name != "matvec":
            continue  # see `has_tensor_cores`
        named, _, built = compile_triton(capability, rows, bits, dtype, group)
        assert named == name
        assert built.asm["cubin"][:4] == b"\x7fELF"
        assert built.metadata.shared <= 99 << 10  # the limit per block of consumer cards
        ptx = built.asm["ptx"]
        assert not re.search(r"cvt\.rn\.f32\.[su]", ptx)  # no integer is converted
        if name == "matvec":  # the weight is loaded 16 bytes at a time
            assert re.search(r"ld\.global\.L1::evict_first[\w.:]*v4\.b32", ptx)
        else:
            assert "mma" in ptx
            assert re.search(r"cp\.async\.cg\.shared\.global[^;]*, 0x10,", ptx)  # 16 bytes at a time


@pytest.mark.parametrize("bits, dtype", quantization_triton.PTX)
def test_ptx_conversion_is_exact(bits, dtype):
    """The PTX instructions for 4 bytes of a weight, run in numpy on every byte; no step may round."""
    import numpy

    words = numpy.concatenate([numpy.roll(numpy.arange(256, dtype=numpy.uint8), i) for i in range(4)])
    signed = words.view(numpy.int8)
    wanted = [signed >> 4, (signed << 4) >> 4] if bits == 4 else [signed]
    words = words.view(numpy.uint32)
    held = {"$4" if bits == 4 else "$2": words}

    def value(key):
        return held[key] if key in held else numpy.full_like(words, int(key, 0))

    def floats(word, kind):
        dtype = {"f16x2": torch.float16, "bf16x2": torch.bfloat16, "f32": torch.float32}[kind]
        return torch.from_numpy(word.view(numpy.int32)).view(dtype).double()

    def exactly(values, kind):
        dtype = {"f16x2": torch.float16, "bf16x2": torch.bfloat16, "f32": torch.float32}[kind]
        assert torch.equal(values.to(dtype).double(), values)
        return values.to(dtype).view(torch.int32).numpy().view(numpy.uint32)

    for line in quantization_triton.PTX[bits, dtype].strip("{} \n").split(";"):
        name, _, operands = line.strip().partition(" ")
        name, kind = name.partition(".")[0], name.rpartition(".")[2]
        target, *sources = (part.strip() for part in operands.split(","))
        if name == "prmt":
            taken = numpy.concatenate([value(source).view(numpy.uint8).reshape(-1, 4) for source in sources[:2]], 1)
            taken = taken[:, [int(sources[2], 0) >> 4 * i & 7 for i in range(4)]]
            held[target] = numpy.ascontiguousarray(taken).view(numpy.uint32)[:, 0]
        elif name in ("lop3", "xor", "shr", "mov"):
            assert name != "lop3" or sources.pop() == "0x6a"
            a, b, c = (*map(value, sources), None, None)[:3]
            held[target] = a & b ^ c if name == "lop3" else a ^ b if name == "xor" else a >> b if name == "shr" else a
        elif name in ("fma", "add"):
            a, *b, c = (floats(value(source), kind) for source in sources)
            held[target] = exactly(a * b[0] + c if b else a + c, kind)
        else:
            assert name in ("", "{") or line.strip().startswith(".reg"), line
    for first, columns in zip((0, 2), wanted):
        pairs = [floats(held[f"${i}"], "f16x2" if dtype == torch.float16 else "bf16x2") for i in (first, first + 1)]
        assert (torch.stack([pair.view(-1, 2) for pair in pairs], 1).flatten().numpy() == columns).all()


# ---- where the kernels cannot run ------------------------------------------------------------------------------------


def test_unavailable_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in quantization_triton.unavailable(CUDA)


@pytest.mark.parametrize("arch, reason", [(70, "7.0"), (75, None), (120, None)])
def test_unavailable_below_capability_7_5(monkeypatch, arch, reason):
    active = types.SimpleNamespace(get_current_target=lambda: types.SimpleNamespace(backend="cuda", arch=arch))
    runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=active))
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.9.0", runtime=runtime))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(quantization_triton, "multiply_two_weights", lambda device: None)
    answer = quantization_triton.unavailable(CUDA)
    assert answer is None if reason is None else reason in answer
    monkeypatch.setattr(quantization_triton, "multiply_two_weights", lambda device: 1 / 0)
    failure = "3.9.0 cannot compile for this card (division by zero): upgrade"
    assert (reason or failure) in quantization_triton.unavailable(CUDA)


if __name__ == "__main__":
    print(json.dumps(interpret()))
