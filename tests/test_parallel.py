"""More than one device: two processes give what one gives, and a map of limited memory computes the same."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM

TENSOR_PARALLEL = """
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


FULLY_SHARDED = """
import copy, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
dist.init_process_group("gloo")
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).train()
whole.gradient_checkpointing_enable()
sharded = copy.deepcopy(whole)
for block in sharded.transformer.encoder.layers:
    fully_shard(block)
fully_shard(sharded)
rows = torch.randint(3, 1600, (2, 40), generator=torch.Generator().manual_seed(0))

def step(model, ids):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()

loss = step(sharded, rows[dist.get_rank()][None])
one = step(whole, rows)
losses = [None, None]
dist.all_gather_object(losses, loss)
assert abs(sum(losses) / 2 - one) < 1e-5, (losses, one)
for (name, part), full in zip(sharded.named_parameters(), whole.parameters()):
    assert isinstance(part, DTensor) and part.to_local().numel() * 2 == full.numel(), name
    torch.testing.assert_close(part.full_tensor(), full, atol=1e-6, rtol=1e-5)
print("the same step")
dist.destroy_process_group()
"""


def run_on_two_processes(script, tmp_path):
    """stdout of `script` under torchrun, two processes over gloo."""
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, TINY],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.needs_transformers("4.57", "the tensor-parallel styles of the plan")
def test_tensor_parallel_equals_one_process(tmp_path):
    """tp_plan="auto" cuts the fused query_key_value and gate/up projections by rows, right for 2 groups."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    if "colwise_rep" not in ALL_PARALLEL_STYLES:
        pytest.skip("needs transformers 4.57, 5.0 or 5.23: the style colwise_rep, which releases between them lack")
    assert run_on_two_processes(TENSOR_PARALLEL, tmp_path).count("the same logits") == 2


@pytest.mark.needs_transformers("4.57", "dtype= in from_pretrained, which the script uses")
def test_fully_sharded_step_equals_one_process(tmp_path):
    """FSDP2 with checkpointed blocks: a row on each of two processes moves the weights as both rows on one do."""
    assert run_on_two_processes(FULLY_SHARDED, tmp_path).count("the same step") == 2


@pytest.mark.needs_transformers("4.48", "device_map on a machine without a GPU")
@pytest.mark.parametrize("bits", [0, 4, 8])
@torch.no_grad()
def test_device_map_with_little_memory(tiny_model, tmp_path, bits):
    """device_map="auto" puts what max_memory has no room for on the disk; float and quantized logits stay."""
    folder, settings = TINY, {"trust_remote_code": True, "torch_dtype": torch.float32}
    if bits:
        folder = tmp_path / "quantized"
        AutoModelForCausalLM.from_pretrained(TINY, **settings).quantize(bits).save_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, **settings)
    limit = {"cpu": int(whole.get_memory_footprint() * 0.8)}
    offload = {"max_memory": limit, "offload_folder": str(tmp_path / "offload")}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", **offload, **settings)
    assert {"cpu", "disk"} <= set(model.hf_device_map.values())
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)
