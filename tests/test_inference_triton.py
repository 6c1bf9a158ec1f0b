"""inference_triton without a GPU: RMSNorm, the rotation and silu(gate) * up in Triton's interpreter, and compiled.

The interpreter runs in a subprocess, which is this file as a program. test_cuda_device.py runs the kernels on a card.
"""

import inspect
import json

import pytest
import torch
from chatglm2 import inference_triton, modeling_chatglm
from triton_compile import compile_inference
from triton_helpers import needs_triton, run_in_the_interpreter

DTYPES = ("float32", "float16", "bfloat16")
ROTATIONS = {  # B, T, heads, D, rows of the angles
    "a token": (1, 1, 34, 128, 1),
    "tokens": (2, 3, 6, 16, 1),
    "angles of each row": (3, 2, 5, 64, 3),
    "heads of 80": (1, 4, 7, 80, 1),
}
ROWS = {"one row": (1, 4096), "rows": (3, 5, 200), "many channels": (2, 13696)}  # of RMSNorm
GATED = {"one row": (1, 2 * 13696), "rows": (3, 5, 2 * 200)}


def tensors(kind, name, dtype):
    """The arguments of the function, whose first is a part of a larger tensor in the rotation."""
    generator = torch.Generator().manual_seed(len(kind + name))
    if kind == "rotate":
        B, T, heads, D, rows = ROTATIONS[name]
        mixed = torch.randn(B, T, heads + 3, D, generator=generator).to(dtype)
        angles = 100 * torch.randn(rows, T, 1, D // 4, generator=generator)
        return mixed[:, :, :heads], angles.cos(), angles.sin()
    shape = (ROWS if kind == "rms_norm" else GATED)[name]
    x = 4 * torch.randn(shape, generator=generator).to(dtype)
    if kind == "gated":
        return (x,)
    return x, shape[-1:], torch.rand(shape[-1], generator=generator).to(dtype), 1e-5


PLAIN = {
    "rotate": inspect.unwrap(modeling_chatglm.rotate),
    "gated": inspect.unwrap(modeling_chatglm.gated),
    "rms_norm": lambda x, shape, weight, eps: x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight,
}
CASES = [
    (kind, name) for kind, names in (("rotate", ROTATIONS), ("gated", GATED), ("rms_norm", ROWS)) for name in names
]


def error(kind, name, dtype, got):
    """The largest error of a result, in units of its dtype's rounding; of the rotation in torch's own of that dtype."""
    arguments = tensors(kind, name, dtype)
    with torch.no_grad():
        same = PLAIN[kind](*arguments) if kind == "rotate" else None
        want = PLAIN[kind](*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    if kind == "rotate":  # the same operations
        return float((got.cpu() != same).sum())
    unit = torch.finfo(dtype).eps / 2
    return float(((got.cpu().double() - want).abs() / (unit * want.abs()).clamp(min=1e-7)).max())


def bound(kind, dtype):
    """Rounding once in a half's precision; silu is rounded, too; sums and exponentials of float32."""
    if kind == "rotate":
        return 0
    return 40 if dtype == "float32" else 2.1 if kind == "gated" else 1.1


def interpret():
    """Return {case: error}. Runs with TRITON_INTERPRET=1; the interpreter truncates bfloat16, so it is left out."""
    results = {}
    for kind, name in CASES:
        for dtype in (torch.float32, torch.float16):
            got = getattr(inference_triton, "triton_" + kind)(*tensors(kind, name, dtype))
            results[f"{kind}, {name}, {str(dtype)[6:]}"] = error(kind, name, dtype, got)
    return results


@pytest.fixture(scope="module")
def interpreted():
    return run_in_the_interpreter(__file__)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("kind, name", CASES)
def test_values_in_the_interpreter(interpreted, kind, name, dtype):
    assert interpreted[f"{kind}, {name}, {dtype}"] <= bound(kind, dtype)


@needs_triton
@pytest.mark.parametrize("capability", (75, 80, 90, 120))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_kernels_compile_for_each_capability(capability, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, built in compile_inference(capability, dtype).items():
        assert built.asm["cubin"][:4] == b"\x7fELF"
        assert "ld.global.v4" in built.asm["ptx"], name  # 16 bytes at a time


def test_which_calls_they_compute(monkeypatch):
    """Inference on a GPU; RMSNorm of a few rows, the rotation by float32 angles of the right shape."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    computed = []
    monkeypatch.setattr(inference_triton, "PLAIN", (FakeTensor,))
    monkeypatch.setattr(inference_triton, "needs_dispatch", lambda x: False)  # these tensors are fakes
    monkeypatch.setattr(inference_triton, "runs_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def served(function, *arguments):
        fits = inspect.getclosurevars(function).nonlocals["fits"]
        either = inference_triton.in_triton(lambda *args: computed.append(True), fits)(lambda *args: None)
        computed.clear()
        either(*arguments)
        return bool(computed)

    def fake(*shape, dtype=torch.float16, device="cuda:0"):
        return torch.empty(shape, dtype=dtype, device=device)

    def rotates(*arguments):
        return served(modeling_chatglm.rotate, *arguments)

    def normalizes(x, weight):
        return served(inference_triton.rms_norm, x, x.shape[-1:], weight, 1e-5)

    with FakeTensorMode():
        x, weight = fake(16, 64), fake(64)
        angles = fake(1, 3, 1, 4, dtype=torch.float32)
        with torch.no_grad():
            assert normalizes(x, weight) and normalizes(x, fake(64, dtype=torch.float32))
            assert not normalizes(fake(17, 64), weight) and not normalizes(x, fake(63))
            assert not normalizes(fake(16, 64, dtype=torch.float64), weight)
            assert not normalizes(fake(16, 64, device="cpu"), weight) and not normalizes(fake(0, 64), weight)
            assert rotates(fake(2, 3, 5, 16), angles, angles)
            assert not rotates(fake(2, 3, 5, 16), angles.half(), angles)
            assert not rotates(fake(2, 4, 5, 16), angles, angles)
        assert not normalizes(x, weight)


if __name__ == "__main__":
    print(json.dumps(interpret()))
