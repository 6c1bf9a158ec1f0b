"""finetune/: the data is read as the original did, each method learns a dialogue, and what it saves answers with it."""

import importlib
import json
import math
import os
import subprocess
import sys

import checkpoints
import data
import pytest
import torch
import train
from conftest import ROOT, TINY
from transformers import AutoConfig, AutoModel, AutoTokenizer

FOLDER = ROOT / "finetune"

pytestmark = pytest.mark.needs_transformers("4.57.0", "the Trainer that the scripts were written for")

QUERY, ANSWER = "What is your name?", "I am a small model."
PREFIX = ["--pre_seq_len", "16", "--learning_rate", "0.7"]
LORA = ["--method", "lora", "--learning_rate", "1e-2"]
FULL = ["--method", "full", "--learning_rate", "1e-3"]
COLUMNS = {"prompt_column": "prompt", "response_column": "response", "history_column": "history"}


# Data


def rows_of(tokenizer, path, source=1024, target=1024, **columns):
    return data.make_examples(tokenizer, data.read_rounds(path, **columns), source, target, progress=False)


def test_both_formats_give_the_same_examples(tokenizer):
    """The example files hold the same dialogues: same ids, same labels, an example for each answer."""
    columns = rows_of(tokenizer, FOLDER / "columns.jsonl", **COLUMNS)
    assert columns == rows_of(tokenizer, FOLDER / "messages.jsonl")
    assert (len(columns.rows), columns.cut_prompts, columns.cut_answers) == (3, 0, 0)


def test_an_example_is_prompt_answer_and_end(tokenizer):
    """The ids that chat feeds, then the answer tokenized by itself and </s>, which alone have labels."""
    rounds = data.read_rounds(FOLDER / "columns.jsonl", **COLUMNS)
    row = rows_of(tokenizer, FOLDER / "columns.jsonl", **COLUMNS).rows[1]
    history = [
        tuple(turn)
        for turn in json.loads((FOLDER / "columns.jsonl").read_text(encoding="utf-8").splitlines()[1])["history"]
    ]
    prompt = tokenizer(tokenizer.build_prompt("和谁下", history))["input_ids"]
    answer = tokenizer.encode("我喜欢和你下棋。", add_special_tokens=False)
    assert row["input_ids"] == [*prompt, *answer, 2]
    assert row["labels"] == [-100] * len(prompt) + [*answer, 2]
    assert [item.line for item in rounds] == [1, 2, 3]


def test_a_system_message_stands_first(tokenizer, tmp_path):
    """It is part of the prompt of every answer, in the template's place."""
    file = tmp_path / "data.jsonl"
    system = {"role": "system", "content": "Be brief."}
    turns = [{"role": "user", "content": QUERY}, {"role": "assistant", "content": ANSWER}]
    file.write_text(json.dumps({"dialogue": [system, *turns]}) + "\n\n")
    (row,) = rows_of(tokenizer, file, messages_column="dialogue").rows
    prompt = tokenizer(f"Be brief.\n\n{tokenizer.build_prompt(QUERY)}")["input_ids"]
    assert row["labels"].count(-100) == len(prompt) and row["input_ids"][: len(prompt)] == prompt


def test_long_examples_are_truncated_and_counted(tokenizer):
    """A prompt keeps [gMASK] sop and its end; an answer keeps its beginning, and does not end."""
    whole = rows_of(tokenizer, FOLDER / "messages.jsonl").rows
    cut = rows_of(tokenizer, FOLDER / "messages.jsonl", source=20, target=6)
    assert (cut.cut_prompts, cut.cut_answers) == (3, 3)
    for long, short in zip(whole, cut.rows):
        prompt = long["labels"].count(-100)
        ids = long["input_ids"]
        assert short["input_ids"] == ids[:2] + ids[prompt - 18 : prompt] + ids[prompt : prompt + 6]
        assert short["labels"].count(-100) == 20


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "columns, line, message",
    [
        (COLUMNS, '{"prompt": "a", ', "is not JSON .* one object per line"),
        (COLUMNS, '["a", "b"]', r"\['a', 'b'\] is not a JSON object"),
        (COLUMNS, {"prompt": "a", "answer": "b", "history": []}, "no column 'response', only 'prompt', 'answer'"),
        (COLUMNS, {"prompt": "a", "response": "  ", "history": []}, "response is '  ': give a non-empty string"),
        (COLUMNS, {"prompt": 3, "response": "b", "history": []}, "prompt is 3: give a non-empty string"),
        (COLUMNS, {"prompt": "a", "response": "b", "history": "c"}, "history is 'c': give a list"),
        (COLUMNS, {"prompt": "a", "response": "b", "history": [["c"]]}, r"history\[0\] is \['c'\]: give \[query"),
        ({}, {"prompt": "a"}, "no column 'messages', only 'prompt'"),
        ({}, {"messages": []}, r"messages is \[\]: give a list of messages"),
        ({}, {"messages": [USER, "b"]}, r"messages\[1\] is 'b': give an object with role and content"),
        ({}, {"messages": [USER, USER]}, r"messages\[1\] has the role 'user' where 'assistant' is expected"),
        ({}, {"messages": [ASSISTANT]}, r"messages\[0\] has the role 'assistant' where 'user' is expected"),
        ({}, {"messages": [USER, {"role": "tool", "content": "b"}]}, r"messages\[1\] has the role 'tool'"),
        ({}, {"messages": [USER, ASSISTANT, USER]}, "the last message is not the assistant's"),
        ({}, {"messages": [USER, {"role": "assistant", "content": ""}]}, r"messages\[1\]\['content'\] is '': give"),
        ({}, b"\xff\xfe{}", "byte 0 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, columns, line, message):
    """The file, the line's number, what is wrong there and what to do."""
    good = {"prompt": "a", "response": "b", "history": None} if columns else {"messages": [USER, ASSISTANT]}
    file = tmp_path / "data.jsonl"
    line = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    file.write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"data.jsonl, line 3: .*{message}"):
        data.read_rounds(file, **columns)


# Training


@pytest.fixture(scope="module")
def dialogue(tmp_path_factory):
    """A file with one dialogue that the tiny checkpoint does not know."""
    file = tmp_path_factory.mktemp("data") / "new.jsonl"
    messages = [{"role": "user", "content": QUERY}, {"role": "assistant", "content": ANSWER}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    return file


def prepare(file, output, *arguments):
    """train.py up to the training itself: (trainer, checkpoint)."""
    common = ["--train_file", str(file), "--output_dir", str(output), "--use_cpu", "--disable_tqdm", "true"]
    return train.prepare(*train.parse([*common, *arguments], train.__doc__, train.ARGUMENTS))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def answer(model, tokenizer, query=QUERY, history=None):
    return model.eval().chat(tokenizer, query, history, do_sample=False, max_new_tokens=30)[0]


def test_the_tiny_checkpoint_does_not_know_the_dialogue(tiny_model, tokenizer):
    assert answer(tiny_model, tokenizer) != ANSWER


METHODS = {
    "prefix": [*PREFIX, "--max_steps", "60"],
    "prefix on int4": [*PREFIX, "--max_steps", "60", "--quantization_bit", "4", "--gradient_checkpointing", "false"],
    "lora": [*LORA, "--max_steps", "15"],
    "lora on int4": [*LORA, "--max_steps", "15", "--quantization_bit", "4"],
    "lora on int8": [*LORA, "--max_steps", "15", "--quantization_bit", "8", "--bf16"],
    "full": [*FULL, "--max_steps", "10"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_a_new_dialogue(method, dialogue, tmp_path, tokenizer):
    """The loss is finite and falls, only what the method trains is trained, and the saved files give the answer."""
    if "lora" in method:
        pytest.importorskip("peft")
    trainer, _ = prepare(dialogue, tmp_path / "out", *METHODS[method], "--logging_steps", "1", "--save_strategy", "no")
    names = set(trained_weights(trainer))
    part = {"prefix": "prefix_encoder", "lora": "lora_", "full": ""}[method.split()[0]]
    assert names and all(part in name for name in names)
    if part:
        assert {name for name, _ in trainer.model.named_parameters() if part in name} == names
    assert all(p.dtype == torch.float32 for p in trained_weights(trainer).values())
    train.train(trainer)
    curve = losses(trainer)
    assert all(map(math.isfinite, curve)) and curve[-1] < 0.2 * curve[0]

    if method == "full":
        model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert model.config.use_cache and model.dtype == torch.float32
    else:
        bits = trainer.model.config.quantization_bit
        assert bits == {"int4": 4, "int8": 8}.get(method.split()[-1], 0)
        dense = trainer.model.get_submodule(next(n for n, _ in trainer.model.named_modules() if n.endswith("dense")))
        assert getattr(dense, "base_layer", dense).weight.dtype == (torch.int8 if bits else torch.float32)
        model = checkpoints.load_model(TINY, torch.float32, bits, tmp_path / "out")
    assert answer(model, tokenizer) == ANSWER


def test_history_is_learned(tmp_path, tokenizer):
    """The example file's second round is answered behind its first one."""
    trainer, _ = prepare(FOLDER / "messages.jsonl", tmp_path, *FULL, "--max_steps", "20", "--save_strategy", "no")
    trainer.train()
    first = answer(trainer.model, tokenizer, "你会下棋吗")
    assert first == "我会下棋，但是下得不好。"
    assert answer(trainer.model, tokenizer, "和谁下", [("你会下棋吗", first)]) == "我喜欢和你下棋。"


@pytest.mark.parametrize("arguments", [PREFIX, LORA, FULL], ids=["prefix", "lora", "full"])
def test_resuming_matches_an_uninterrupted_run(arguments, tmp_path):
    """From checkpoint-2 of 4 steps, with shuffling and dropout: the same weights."""
    if "lora" in arguments:
        pytest.importorskip("peft")
    arguments = [*arguments, "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
    arguments += ["--per_device_train_batch_size", "1"]
    whole, _ = prepare(FOLDER / "messages.jsonl", tmp_path / "whole", *arguments)
    whole.train()
    before = tmp_path / "whole" / "checkpoint-2"
    again = ["--resume_from_checkpoint", str(before)]
    resumed, checkpoint = prepare(FOLDER / "messages.jsonl", tmp_path / "resumed", *arguments, *again)
    start = trained_weights(resumed)
    train.train(resumed, checkpoint)
    assert len(losses(whole)) == 4 and losses(resumed) == losses(whole)
    want, got = trained_weights(whole), trained_weights(resumed)
    assert want.keys() == got.keys() and not any(
        torch.equal(got[name], start[name]) for name in got if "bias" not in name
    )
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-7)
    if arguments[0] == PREFIX[0]:
        state = torch.load(before / "pytorch_model.bin", weights_only=True)
        assert list(state) == ["transformer.prefix_encoder.embedding.weight"]


def test_gradient_checkpointing_changes_nothing(dialogue, tmp_path):
    """It is on by default, can be switched off, and the weights after two steps agree."""
    common = [*FULL, "--max_steps", "2", "--save_strategy", "no"]
    on, _ = prepare(dialogue, tmp_path, *common)
    off, _ = prepare(dialogue, tmp_path, *common, "--gradient_checkpointing", "false")
    on.train(), off.train()
    used = [
        any(m.gradient_checkpointing for m in t.model.modules() if hasattr(m, "gradient_checkpointing"))
        for t in (on, off)
    ]
    assert used == [True, False]
    for name, weight in trained_weights(on).items():
        torch.testing.assert_close(weight, trained_weights(off)[name])


# Prefixes, ours and the original's


@pytest.mark.parametrize("projection", [[], ["--prefix_projection"]], ids=["embedding", "mlp"])
def test_original_loads_our_prefix(projection, dialogue, tmp_path):
    """By the lines that its README tells its users to write."""
    trainer, _ = prepare(dialogue, tmp_path, "--pre_seq_len", "5", *projection, "--max_steps", "1")
    train.train(trainer)
    options = {"pre_seq_len": 5, "prefix_projection": bool(projection)}
    config = AutoConfig.from_pretrained(TINY, trust_remote_code=True, **options)
    model = AutoModel.from_pretrained(TINY, config=config, trust_remote_code=True)
    state = torch.load(os.path.join(tmp_path, "pytorch_model.bin"))
    start = "transformer.prefix_encoder."
    assert all(name.startswith(start) for name in state) and not (tmp_path / "config.json").exists()
    model.transformer.prefix_encoder.load_state_dict({name[len(start) :]: value for name, value in state.items()})
    ours = checkpoints.load_model(TINY, model.dtype, checkpoint=tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.eval()(ids).logits, ours.eval()(ids).logits)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_prefix_of_the_original_loads(file, dialogue, tmp_path):
    """Half precision, keys of the whole model beside it, and either file name; and training goes on from it."""
    from safetensors.torch import save_file

    weight = torch.randn(7, 4 * 2 * 2 * 32, dtype=torch.float16)
    state = {"transformer.prefix_encoder.embedding.weight": weight, "transformer.other.weight": torch.ones(2)}
    torch.save(state, tmp_path / file) if file.endswith("bin") else save_file(state, tmp_path / file)
    model = checkpoints.load_model(TINY, torch.float32, checkpoint=tmp_path)
    assert model.config.pre_seq_len == 7 and not model.config.prefix_projection
    assert torch.equal(model.transformer.prefix_encoder.embedding.weight, weight.float())
    trainer, _ = prepare(dialogue, tmp_path / "out", "--ptuning_checkpoint", str(tmp_path))
    assert torch.equal(trainer.model.transformer.prefix_encoder.embedding.weight, weight.float())


def test_a_folder_without_a_prefix_is_named(tmp_path):
    """Nothing there, or other weights."""
    with pytest.raises(ValueError, match="holds neither pytorch_model.bin nor model.safetensors"):
        checkpoints.load_model(TINY, torch.float32, checkpoint=tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no transformer.prefix_encoder.embedding.weight"):
        checkpoints.load_model(TINY, torch.float32, checkpoint=tmp_path)


def test_a_merged_adapter_is_a_plain_model(dialogue, tmp_path, tokenizer):
    """merge_and_unload on float weights, save_pretrained, AutoModel: the answer without PEFT."""
    pytest.importorskip("peft")
    trainer, _ = prepare(dialogue, tmp_path / "lora", *METHODS["lora"], "--save_strategy", "no")
    train.train(trainer)
    model = checkpoints.load_model(TINY, torch.float32, checkpoint=tmp_path / "lora").merge_and_unload()
    checkpoints.include_code(model, tokenizer)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert isinstance(merged.transformer.encoder.layers[0].mlp.dense_h_to_4h, torch.nn.Linear)
    assert answer(merged, tokenizer) == ANSWER


# What is refused, and when


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "lora", "--pre_seq_len", "4"], "--method lora has no prefix"),
        (["--quantization_bit", "4"], "--quantization_bit 4: int weights cannot be trained in full"),
        (["--method", "lora", "--quantization_bit", "5"], "--quantization_bit 5: give 4 or 8"),
        (["--prompt_column", "prompt"], "give prompt_column and response_column"),
        (["--max_source_length", "2"], "max_source_length=2, .*give at least 3"),
        (["--resume_from_checkpoint", "true"], "holds no whole checkpoint; leave it out"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is not a directory"),
        (["--model_name_or_path", "nowhere"], "nowhere is not a directory"),
    ],
)
def test_invalid_arguments_are_rejected_early(arguments, message, dialogue, tmp_path, monkeypatch):
    """The value, the limit, the cure; and no model was loaded for it."""
    monkeypatch.setattr(train, "load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message):
        prepare(dialogue, tmp_path / "out", *arguments)


def test_output_of_an_earlier_run_is_not_overwritten(dialogue, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="holds checkpoint-3 of an earlier run: continue with --resume_from"):
        prepare(dialogue, tmp_path, *PREFIX)


def test_an_example_longer_than_the_model_is_named(tmp_path):
    file = tmp_path / "long.jsonl"
    messages = [{"role": "user", "content": "冰" * 900}, {"role": "assistant", "content": "水" * 900}]
    file.write_text(json.dumps({"messages": messages}))
    with pytest.raises(ValueError, match=r"long.jsonl, line 1: \d+ tokens exceed seq_length=1024"):
        prepare(file, tmp_path / "out", *PREFIX)


def test_full_training_of_int4_weights_is_rejected(dialogue, tmp_path, tiny_model):
    import copy

    copy.deepcopy(tiny_model).quantize(4).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    with pytest.raises(ValueError, match="holds int4 weights, which cannot be trained in full"):
        prepare(dialogue, tmp_path / "out", *FULL, "--model_name_or_path", str(tmp_path))


def test_non_finite_loss_ends_the_run(dialogue, tmp_path):
    arguments = ["--method", "full", "--learning_rate", "1e30", "--lr_scheduler_type", "constant"]
    trainer, _ = prepare(dialogue, tmp_path, *arguments, "--max_steps", "9", "--logging_steps", "1")
    with pytest.raises(FloatingPointError, match="at step [2-9], learning rate 1e.30: lower --learning_rate"):
        trainer.train()


# As a user runs it


def run(script, *arguments, text=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, input=text, capture_output=True, encoding="utf-8", env=environment, timeout=300)


@pytest.mark.tools
@pytest.mark.parametrize(
    "option", ["--load_in_4bit", "--max_length 20", "--attn_implementation eager", "--dtype float16"]
)
def test_unsupported_trl_options_are_rejected(option, tmp_path):
    """Nothing of TRL's arguments is passed over in silence: the option is named, before the model is loaded."""
    import sft

    arguments = ["--model_name_or_path", str(TINY), "--train_file", str(FOLDER / "messages.jsonl"), "--use_cpu"]
    with pytest.raises(SystemExit, match=option.split()[0]):
        sft.main([*arguments, "--output_dir", str(tmp_path / "out"), *option.split()])


@pytest.mark.tools
def test_scripts_from_the_command_line(tmp_path):
    """train.py shows a bar and says what it did; cli_demo.py gives the answer."""
    output = str(tmp_path / "out")
    common = ["--use_cpu", "--output_dir", output, *LORA, "--max_steps", "20", "--save_strategy", "no"]
    done = run("finetune/train.py", "--train_file", str(FOLDER / "messages.jsonl"), *common)
    assert done.returncode == 0, done.stderr
    assert "messages.jsonl: 3 answers, 141 tokens, the longest example 69; cut: 0 prompts, 0 answers" in done.stdout
    assert "lora: 114,688 parameters are trained" in done.stdout and "20/20" in done.stderr
    done = run("demos/cli_demo.py", "--checkpoint", output, "--temperature", "0", "--device", "cpu", text=f"{QUERY}\n")
    assert done.stdout == f"{ANSWER}\n", done.stderr


def test_invalid_line_ends_the_script_with_one_line(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((FOLDER / "messages.jsonl").read_text(encoding="utf-8") + '{"messages": 1}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="^error: .*bad.jsonl, line 3: messages is 1: give a list of messages.$"):
        train.main(["--train_file", str(bad), "--output_dir", str(tmp_path / "out"), "--use_cpu"])


# With the tools' own packages


@pytest.mark.tools
def test_the_loss_curve_is_drawn(dialogue, tmp_path):
    """loss.png is a picture with a curve in it: pixels of the line's colour."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    arguments = [*FULL, "--max_steps", "3", "--logging_steps", "1", "--validation_file", str(dialogue)]
    trainer, _ = prepare(dialogue, tmp_path, *arguments, "--eval_strategy", "steps", "--eval_steps", "1")
    train.train(trainer)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1, 2, 3]
    picture = torch.tensor(pyplot.imread(tmp_path / "loss.png"))[..., :3]
    for colour in ("#1f77b4", "#ff7f0e"):  # matplotlib's first two: training and validation
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert ((picture - rgb).abs().amax(-1) < 0.02).sum() > 100


@pytest.mark.tools
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_sft_trainer_learns_from_messages(peft, tmp_path, tokenizer):
    """TRL's SFTTrainer as a script: a loss on answers and </s> only, and the saved files give the answers."""
    pytest.importorskip("trl")
    output = str(tmp_path / "out")
    how = ["--use_peft", "--lora_r", "8", "--learning_rate", "5e-3"] if peft else ["--learning_rate", "1e-3"]
    common = ["--model_name_or_path", str(TINY), "--train_file", str(FOLDER / "messages.jsonl"), "--use_cpu"]
    done = run("finetune/sft.py", *common, "--output_dir", output, *how, "--max_steps", "40" if peft else "20")
    assert done.returncode == 0, done.stderr
    if peft:
        model = checkpoints.load_model(TINY, torch.float32, checkpoint=output)
    else:
        model = AutoModel.from_pretrained(output, trust_remote_code=True)
    assert answer(model, tokenizer) == ANSWER
    assert answer(model, tokenizer, "和谁下", [("你会下棋吗", "我会下棋，但是下得不好。")]) == "我喜欢和你下棋。"


@pytest.mark.tools
def test_sft_trainer_keeps_the_labels(tmp_path):
    """What SFTTrainer's batches hold is what data.py made: TRL neither tokenizes nor cuts them again."""
    pytest.importorskip("trl")
    sft = importlib.import_module("sft")
    options = ["--model_name_or_path", str(TINY), "--train_file", str(FOLDER / "messages.jsonl"), "--use_cpu"]
    parsed = sft.parse([*options, "--output_dir", str(tmp_path)], sft.__doc__, sft.ARGUMENTS)
    trainer, _ = sft.prepare(*parsed)
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    rows = rows_of(checkpoints.load_tokenizer(TINY), FOLDER / "messages.jsonl").rows
    for ids, labels, mask, row in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], rows):
        assert ids[mask.bool()].tolist() == row["input_ids"]
        assert labels[mask.bool()].tolist() == row["labels"] and (labels[~mask.bool()] == -100).all()


@pytest.mark.tools
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_trl_by_itself_teaches_the_end_of_an_answer(tmp_path, form, caplog):
    """SFTTrainer as its own script uses it: the labels are the answer, as it is generated, and </s>."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "早上好！"}]
    row = {"messages": messages} if form == "messages" else {"prompt": messages[:1], "completion": messages[1:]}
    options = {"assistant_only_loss": True} if form == "messages" else {}
    trainer = SFTTrainer(
        model=checkpoints.load_model(TINY, torch.float32),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **options),
        train_dataset=Dataset.from_list([row]),
        processing_class=checkpoints.load_tokenizer(TINY),
    )
    tokenizer = checkpoints.load_tokenizer(TINY)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer.encode("早上好！", add_special_tokens=False), tokenizer.eos_token_id]
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].tolist() == [prompt + answer]
    assert batch["labels"].tolist() == [[-100] * len(prompt) + answer]
    assert "not a prefix" not in caplog.text
