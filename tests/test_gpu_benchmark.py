"""`python benchmarks gpu`, the run for a rented GPU, in tiny shapes on a CPU: a typo must not cost time on a card."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from triton_helpers import triton_version


@pytest.mark.needs_transformers("4.57", "StaticCache with the arguments of today")
def test_every_stage_runs(tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "benchmarks", "gpu", "--dry", "--out", str(out)]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    failure = "rror" if triton_version >= (3, 4) else "error"  # without Triton, its kernels alone fail
    assert not [line for line in lines if failure in json.dumps(line) and line["stage"] != "env"]
    assert {line["stage"] for line in lines} == {
        "env", "tests", "answers", "memory", "profile", "graph", "layers", "prefill", "tune", "generate"
    }  # fmt: skip
    assert all(line["right"] == line["of"] for line in lines if "of" in line)
    assert not any("cut off" in line["what"] or "no time" in line["what"] for line in lines)
    assert (tmp_path / "profile_int4_host.txt").exists() and (tmp_path / "tests_log.txt").exists()
