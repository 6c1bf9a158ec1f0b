"""lm-evaluation-harness on the tiny checkpoint, as its users run it: generation and log-likelihood, offline."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

pytestmark = pytest.mark.tools

TASKS = ROOT / "evaluation" / "tasks"
MODEL = f"pretrained={TINY},trust_remote_code=True,dtype=float32"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def harness():
    """The harness's own wrapper of a transformers model, around the tiny checkpoint."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(TINY), trust_remote_code=True, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def evaluate(harness):
    """A function of batch size and template: {task: [(what the model gave, score)]} for 12 dialogues."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)

    def run(batch_size, template):
        harness.batch_size_per_gpu = batch_size
        result = simple_evaluate(
            harness,
            tasks=["tiny_answers", "tiny_choices"],
            task_manager=tasks,
            limit=12,
            apply_chat_template=template,
            bootstrap_iters=0,
        )
        metrics = {"tiny_answers": "exact_match", "tiny_choices": "acc"}
        return {
            task: [(sample["filtered_resps"], sample[metric]) for sample in result["samples"][task]]
            for task, metric in metrics.items()
        }

    return run


def test_command_scores_learned_answers(tmp_path):
    """`lm_eval run --model hf` with the chat template: the answers that it learned are given, and preferred."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", MODEL, "--include_path", str(TASKS)]
    options = ["--tasks", "tiny_answers,tiny_choices", "--apply_chat_template", "--batch_size", "8", "--limit", "16"]
    where = ["--device", "cpu", "--output_path", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *options, *where], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = tmp_path.rglob("out*.json")
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    assert results["tiny_answers"]["exact_match,none"] == 1.0
    assert results["tiny_choices"]["acc,none"] == 1.0


@pytest.mark.parametrize("template", [True, False])
def test_batched_matches_single(evaluate, template):
    """Batches of 1 and 4: the same answers to the letter, and log-likelihoods (sums over an answer) to 1e-3."""
    single, batched = evaluate(1, template), evaluate(4, template)
    assert single["tiny_answers"] == batched["tiny_answers"]
    assert len({str(given) for given, _ in single["tiny_answers"]}) > 6
    for (ours, right), (theirs, right_too) in zip(single["tiny_choices"], batched["tiny_choices"]):
        torch.testing.assert_close(torch.tensor(ours)[:, 0], torch.tensor(theirs)[:, 0], atol=1e-3, rtol=1e-5)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs] and right == right_too


@pytest.mark.parametrize("prompt, answer", [("问：你好\n\n答：", "你好！"), ("Hello", " there"), ("a ", "b")])
def test_prefix_tokens_come_only_before_the_context(harness, prompt, answer):
    """[gMASK] sop, the context, the continuation: the ids of the whole text, cut in two."""
    context, continuation = harness._encode_pair(prompt, answer)
    prefix = harness.tokenizer.get_prefix_tokens()
    assert context + continuation == harness.tokenizer(prompt + answer)["input_ids"]
    assert context[:2] == prefix and not set(prefix) & set(context[2:] + continuation) and continuation
    assert harness.tokenizer.decode(continuation).strip() == answer.strip()


def test_generation_is_padded_on_the_left_and_ends_at_eos(harness):
    """What the harness asks of a tokenizer: left padding in front of the prefix, and the name of the eos token."""
    ids, mask = harness.tok_batch_encode(["你好", "a longer text than that"])
    pad = (ids[0] == 0).sum()
    assert pad > 0 and mask[0].tolist() == [0] * pad + [1] * (ids.shape[1] - pad)
    assert ids[0, pad : pad + 2].tolist() == ids[1, :2].tolist() == harness.tokenizer.get_prefix_tokens()
    assert harness.tok_decode(harness.eot_token_id, skip_special_tokens=False) == "</s>"


@torch.no_grad()
def test_log_likelihood_matches_the_model(harness, tiny_model, tokenizer):
    """The harness's figure for an answer is the sum of the model's own log-probabilities of its tokens."""
    from lm_eval.api.instance import Instance

    prompt, answer = tokenizer.build_prompt("你好"), "你好！我是一个很小的模型。"
    request = Instance("loglikelihood", {}, (prompt, answer), 0)
    ((given, greedy),) = harness.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor(tokenizer(prompt + answer)["input_ids"])
    start = len(tokenizer(prompt)["input_ids"])
    chances = tiny_model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
    assert given == pytest.approx(chances.gather(1, ids[start:, None]).sum().item(), abs=1e-3)
    assert greedy == torch.equal(chances.argmax(-1), ids[start:])
