"""The tensor-parallel plan: two processes, each with its share of the rows, give the logits of one."""

import os
import subprocess
import sys

import pytest
from conftest import TINY

SCRIPT = """
import sys, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
dist.init_process_group("gloo")
settings = {"trust_remote_code": True, "dtype": torch.float32}
shared = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", **settings)
ids = torch.arange(3, 40)[None]
with torch.no_grad():
    logits = shared(ids).logits
weight = shared.transformer.encoder.layers[0].self_attention.query_key_value.weight
assert weight.to_local().shape == (192, 256), weight.to_local().shape  # half of [384, 256]
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1], **settings)
with torch.no_grad():
    torch.testing.assert_close(logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
print("the same logits")
dist.destroy_process_group()
"""


@pytest.mark.needs_transformers("4.57", "the tensor-parallel styles of the plan")
def test_two_processes_equal_one(tmp_path):
    """tp_plan="auto" cuts the fused query_key_value and gate/up projections by rows, right for 2 groups."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    if "colwise_rep" not in ALL_PARALLEL_STYLES:
        pytest.skip("needs transformers 4.57, 5.0 or 5.23: the style colwise_rep, which releases between them lack")
    script = tmp_path / "share.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, TINY],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.count("the same logits") == 2, done.stderr[-2000:]
