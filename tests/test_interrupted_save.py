"""finetune/: a run that is killed within a save (SIGKILL) leaves whole checkpoints, and resumes from the newest."""

import json
import multiprocessing
import os
import pathlib
import shutil
import signal

import pytest
import train
from conftest import ROOT
from test_finetune import FULL, LORA, PREFIX, losses, prepare
from transformers import TrainerCallback

pytestmark = [
    pytest.mark.needs_transformers("4.57.0", "the Trainer that the scripts were written for"),
    pytest.mark.skipif(
        "forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no SIGKILL on this system"
    ),
]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, "transformers.trainer", "peft"])
FILE = ROOT / "finetune" / "messages.jsonl"
METHODS = {"prefix": PREFIX, "lora": LORA, "full": FULL}
OPTIONS = ["--max_steps", "3", "--save_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "1"]


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def within_the_weights(trainer):
    """As a file that was being written: half of it."""
    save = trainer._save

    def half(output_dir, *args, **kwargs):
        save(output_dir, *args, **kwargs)
        for path in pathlib.Path(output_dir).iterdir():
            os.truncate(path, path.stat().st_size // 2)
        kill()

    trainer._save = half


def within_the_state(trainer):
    trainer.state.save_to_json = lambda path: (pathlib.Path(path).write_text('{"best_metric": nu'), kill())


def within_deleting_the_old_one(trainer):
    def half(path, ignore_errors=False):
        if not ignore_errors:
            (pathlib.Path(path) / "checkpoint-1" / "trainer_state.json").unlink()
            kill()

    shutil.rmtree = half


MOMENTS = {  # what the second save of a process meets, the checkpoint that is whole then, and one that is not
    "before the weights": (lambda trainer: setattr(trainer, "_save", kill), 1, None),
    "within the weights": (within_the_weights, 1, 2),
    "before the optimizer": (lambda trainer: setattr(trainer, "_save_optimizer_and_scheduler", kill), 1, 2),
    "before the random state": (lambda trainer: setattr(trainer, "_save_rng_state", kill), 1, 2),
    "before the trainer's state": (lambda trainer: setattr(trainer.state, "save_to_json", kill), 1, 2),
    "within the trainer's state": (within_the_state, 1, 2),
    "before it is moved": (lambda trainer: setattr(pathlib.Path, "rename", kill), 1, 2),
    "within deleting the old one": (within_deleting_the_old_one, 2, 1),
}


class AtStepTwo(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.call()


def train_until(output, method, moment):
    """Train, up to that moment of the second save."""
    trainer, _ = prepare(FILE, output, *METHODS[method], *OPTIONS, "--save_total_limit", "1")
    trainer.add_callback(AtStepTwo(lambda: MOMENTS[moment][0](trainer)))
    trainer.train()


def run_and_kill(*arguments):
    """`train_until` in a process of its own. It is no copy of this one, whose threads of autograd it would lack."""
    process = PROCESSES.Process(target=train_until, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module", params=METHODS)
def uninterrupted(request, tmp_path_factory):
    """(name of the method, the losses of a run that nothing interrupts)."""
    if request.param == "lora":
        pytest.importorskip("peft")
    output = tmp_path_factory.mktemp("whole")
    trainer, _ = prepare(FILE, output, *METHODS[request.param], *OPTIONS, "--save_strategy", "no")
    trainer.train()
    return request.param, losses(trainer)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_from_the_newest_whole_checkpoint(uninterrupted, moment, tmp_path, capfd):
    method, want = uninterrupted
    if method != "prefix" and not moment.startswith("within"):
        pytest.skip("as with a prefix")
    _, whole, broken = MOMENTS[moment]
    run_and_kill(tmp_path, method, moment)
    assert [path.name for path in train.checkpoints_in(tmp_path)] == [f"checkpoint-{whole}"]
    capfd.readouterr()
    again = [*METHODS[method], *OPTIONS, "--save_total_limit", "1", "--resume_from_checkpoint", "true"]
    trainer, checkpoint = prepare(FILE, tmp_path, *again)
    assert checkpoint == str(tmp_path / f"checkpoint-{whole}")
    skipped = f"skipped {tmp_path}/_partial/checkpoint-{broken}, which is not whole: its run was killed"
    assert (skipped in capfd.readouterr().out) == (broken is not None)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert losses(trainer) == pytest.approx(want, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_checkpoint_that_is_not_whole_is_skipped_or_refused(tmp_path, capsys):
    """Others write into the folder's own name, and may be killed there; so did this script once."""
    for name, state in (("checkpoint-2", "{}"), ("checkpoint-10", '{"best'), ("checkpoint-11", None)):
        (tmp_path / name).mkdir()
        if state:
            (tmp_path / name / "trainer_state.json").write_text(state)
    arguments = [*PREFIX, "--resume_from_checkpoint"]
    assert prepare(FILE, tmp_path, *arguments, "true")[1] == str(tmp_path / "checkpoint-2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert [line.split(",")[0] for line in lines] == [f"skipped {tmp_path}/checkpoint-{n}" for n in (11, 10)]
    with pytest.raises(ValueError, match="checkpoint-10 is not whole: .* Give another checkpoint, or true"):
        prepare(FILE, tmp_path, *arguments, str(tmp_path / "checkpoint-10"))
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        prepare(FILE, tmp_path, *arguments, "true")


def test_the_best_checkpoint_and_the_newest_are_kept(tmp_path):
    """save_total_limit, and the best one's path, as the Trainer itself does them."""
    options = ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "true", "--max_steps", "5"]
    options += ["--validation_file", str(FILE), "--save_total_limit", "2"]
    trainer, _ = prepare(FILE, tmp_path, *FULL, *OPTIONS, *options)
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": [3.0, 1.0, 2.0, 2.5, 2.6][trainer.state.global_step - 1]}
    trainer.train()
    assert [path.name for path in train.checkpoints_in(tmp_path)] == ["checkpoint-5", "checkpoint-2"]
    for name in ("checkpoint-5", "checkpoint-2"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "_partial").exists()
