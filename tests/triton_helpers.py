"""Triton without a GPU: whether it is there, and its interpreter, which has to be chosen before Triton is imported."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

try:
    triton_version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
except importlib.metadata.PackageNotFoundError:
    triton_version = (0, 0)
# the kernels need 3.2; the interpreter was not tested before 3.4
needs_triton = pytest.mark.skipif(triton_version < (3, 4), reason="Triton 3.4 is not installed: pip install triton")


def run_in_the_interpreter(path):
    """The JSON that a test's file prints last, as a program whose kernels run in the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "lib")}
    run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def multiply_bfloat16():
    """Triton's interpreter stores bfloat16 as its bits, and would multiply those."""
    import numpy
    import triton.language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        def widen(handle):
            if handle.dtype.scalar != triton.language.bfloat16:
                return handle
            return TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), triton.language.float32)

        return original(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot
