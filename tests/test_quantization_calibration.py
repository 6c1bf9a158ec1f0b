"""quantize(calibration=...): the algorithm against its definition, the model's walk, and what is refused."""

import copy
import json
import re
import types

import pytest
import torch
from chatglm2 import quantization_calibration as calibration
from chatglm2.quantization_calibration import round_calibrated, sample_ids
from chatglm2.quantization_format import dequantize_weight, quantize_weight
from conftest import TINY
from model_helpers import logits
from quantization_helpers import DTYPES, linears

SAMPLES = [list(range(3 + 7 * i, 60 + 7 * i)) for i in range(30)]


def correlated(rows=2048, columns=96, outputs=64):
    """Inputs whose channels are correlated, as a network's are, and a weight: float32 [N, in], [out, in]."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(1, 0.05, columns) ** 2
    x = torch.randn(rows, columns, generator=generator) @ mix.t()
    return x, torch.randn(outputs, columns, generator=generator) * 0.02


def output_error(x, weight, packed, scale, bits):
    return (x @ (weight - dequantize_weight(packed, scale, bits, torch.float32)).t()).norm()


def test_gptq_is_the_column_by_column_solution():
    """Against the definition in float64: after each column the error goes to those that are left, by their own H^-1."""
    x, weight = correlated()
    order, hessian = calibration._ordered(x.t() @ x)
    w = weight.t()[order].double()
    scale = w.abs().amax(0, keepdim=True) / 7
    want, left = torch.empty_like(w), w.clone()
    for c in range(len(w)):
        want[c] = (left[c] / scale[0]).round().clamp(-8, 7)
        inverse = hessian[c:, c:].double().inverse()
        left[c:] -= inverse[:, :1] * (left[c] - want[c] * scale[0]) / inverse[0, 0]
    got = calibration._gptq(w.float(), scale.float().expand_as(w), hessian, -8, 7, lambda: None)
    assert (got != want).float().mean() < 0.002  # float32 may round a tie the other way
    plain = (w / scale).round() * scale
    assert (x[:, order].double() @ (w - want * scale)).norm() < 0.5 * (x[:, order].double() @ (w - plain)).norm()


def test_descent_ends_where_no_single_integer_can_improve():
    """And no sweep increases the error; the row's scale has none beside it that is better."""
    x, weight = correlated()
    _, hessian = calibration._ordered(x.t() @ x)
    w = weight.t().contiguous()
    scale = (w.abs().amax(0, keepdim=True) / 8).expand_as(w)

    def error(q, scale=scale):
        rest = w - q * scale
        return (rest * (hessian @ rest)).sum(0)

    q = (w / scale).round().clamp(-8, 7)
    for _ in range(30):
        before = error(q)
        calibration._descend(q, scale, hessian @ w, hessian @ (q * scale), hessian, -8, 7, lambda: None)
        assert (error(q) <= before * (1 + 1e-5)).all()
    for c in (0, 50, 95):
        for step in (-1, 1):
            other = q.clone()
            other[c] = (other[c] + step).clamp(-8, 7)
            assert (error(other) >= error(q) * (1 - 1e-5)).all()
    best = calibration._best_scale(w, q, hessian @ (q * scale), scale[0])
    for factor in (0.99, 1, 1.01):
        assert (error(q, best * factor) >= error(q, best) * (1 - 1e-5)).all()


@pytest.mark.parametrize("bits, group_size, most", [(4, None, 0.5), (4, 32, 0.6), (8, None, 0.6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_error_on_correlated_inputs(bits, group_size, most, dtype):
    """At most 0.6 of plain rounding's error, as root of the squares, on inputs that it has not seen."""
    x, weight = correlated(4096)
    weight, seen, unseen = weight.to(dtype), x[:2048], x[2048:]
    packed, scale = round_calibrated(weight, seen.t() @ seen, bits, group_size)
    plain = quantize_weight(weight, bits, group_size)
    assert scale.dtype == dtype and scale.shape == plain[1].shape
    assert packed.dtype == torch.int8 and packed.shape == plain[0].shape and packed.is_contiguous()
    error = output_error(unseen, weight.float(), packed, scale, bits)
    assert error < most * output_error(unseen, weight.float(), *plain, bits)


def test_degenerate_layers_are_rounded_without_nan():
    """Rows of zeros, channels without input, inputs that are all zero, fewer samples than channels."""
    x, weight = correlated(8)
    weight[3], x[:, 5] = 0, 0
    for moments in (x.t() @ x, torch.zeros(96, 96)):
        packed, scale = round_calibrated(weight, moments, 4)
        assert scale.isfinite().all() and not dequantize_weight(packed, scale, 4)[3].any()
        assert (dequantize_weight(packed, scale, 4) - weight).norm() < 0.3 * weight.norm()


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_see_the_inputs_that_the_quantized_model_gives_them(make_model, monkeypatch, dtype):
    """And leave the rest as it was: the modes, the embedding, the forward methods."""
    model, moments, seen = make_model().to(dtype), {}, {}
    model.transformer.encoder.layers[0].train()
    names = iter(linears(model))
    round_one = calibration.round_calibrated

    def spy(weight, second_moments, *args):
        moments[next(names)] = second_moments.clone()
        return round_one(weight, second_moments, *args)

    monkeypatch.setattr(calibration, "round_calibrated", spy)
    assert model.quantize(4, calibration=SAMPLES, backend="torch") is model and len(moments) == 12
    first, second, _ = model.transformer.encoder.layers
    assert all(module.training for module in first.modules()) and not any(
        module.training for module in second.modules()
    )
    assert not any("forward" in vars(module) for module in model.modules())
    for name, layer in linears(model).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0].float()))
    model.eval()
    for ids in SAMPLES:
        logits(model, torch.tensor([ids]))
    for name, want in moments.items():
        x = torch.cat(seen[name])
        assert torch.allclose(x.t() @ x, want, rtol=0.05, atol=2e-3 * want.abs().max().item()), name


def test_result_is_the_released_format(make_model, tmp_path):
    """quantization_bit alone loads it. The floats: the even column in the high nibble, times the row's scale."""
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from safetensors.torch import load_file

    model, ids = make_model().half(), torch.tensor([SAMPLES[0]])
    plain = copy.deepcopy(model).quantize(4)
    model.quantize(4, calibration=SAMPLES)
    model.save_pretrained(tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_bit"] == 4 and not config.get("quantization_options")
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in linears(model).items():
        packed, scale = tensors[f"{name}.weight"].int(), tensors[f"{name}.weight_scale"].float()
        assert packed.shape == linears(plain)[name].state_dict()["weight"].shape and scale.dim() == 1
        high, low = (packed >> 4) & 15, packed & 15
        q = torch.stack((high, low), -1).flatten(1)
        floats = torch.where(q > 7, q - 16, q) * scale[:, None]
        assert torch.equal(
            floats, dequantize_weight(layer.state_dict()["weight"], layer.weight_scale, 4, torch.float32)
        )
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_calibration_that_was_stopped_goes_on(make_model, tmp_path, monkeypatch):
    """It rounds only what is missing, and gives what one that was never stopped gives."""
    calls, rounding = [], calibration.round_calibrated

    def counted(*args):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return rounding(*args)

    monkeypatch.setattr(calibration, "round_calibrated", counted)
    folder, stop = str(tmp_path / "progress"), None
    want = make_model().quantize(4, calibration=SAMPLES).state_dict()
    calls.clear()
    stop = 7  # in the second of three blocks of four layers
    with pytest.raises(KeyboardInterrupt):
        make_model().quantize(4, calibration=SAMPLES, progress=folder)
    calls.clear()
    stop = None
    got = make_model().quantize(4, calibration=SAMPLES, progress=folder).state_dict()
    assert len(calls) == 12 - 6 and all(torch.equal(got[name], want[name]) for name in want)
    for options in ({"calibration": SAMPLES[:-1]}, {"calibration": SAMPLES, "group_size": 32}):
        calls.clear()
        make_model().quantize(4, progress=folder, **options)
        assert len(calls) == 12, options
    calls.clear()
    make_model(seed=1).quantize(4, calibration=SAMPLES, progress=folder)  # other weights
    assert len(calls) == 12
    calls.clear()
    make_model().half().quantize(4, calibration=SAMPLES, progress=folder)  # another dtype of the weights
    assert len(calls) == 12


def test_calibration_follows_the_other_options(make_model):
    model = make_model()
    first = model.transformer.encoder.layers[0].mlp.dense_h_to_4h
    model.quantize(4, calibration=SAMPLES, skip=("layers.0", "dense"), group_size=32, embedding=True, device="cpu")
    kinds = {name: hasattr(layer, "weight_scale") for name, layer in linears(model).items()}
    assert model.transformer.encoder.layers[0].mlp.dense_h_to_4h is first and sum(kinds.values()) == 6
    layer = model.transformer.encoder.layers[2].mlp.dense_4h_to_h
    assert layer.weight_scale.shape == (64, 3) and model.get_input_embeddings().weight.dtype == torch.int8
    assert model.config.quantization_options["group_size"] == 32


def test_every_public_class_calibrates(make_model):
    from chatglm2.modeling_chatglm import ChatGLMForSequenceClassification, ChatGLMModel

    for cls in (ChatGLMModel, ChatGLMForSequenceClassification):
        model = make_model(cls=cls).bfloat16().quantize(8, calibration=SAMPLES[:5])
        assert all(layer.bits == 8 and layer.weight_scale.dtype == torch.bfloat16 for layer in linears(model).values())
        assert model(torch.tensor([[5, 6, 7]]))[0].isfinite().all()
    with pytest.raises(ValueError, match="query_key_value: the weight is on the meta device"):
        make_model().to("meta").quantize(4, calibration=SAMPLES)


@pytest.mark.needs_transformers("4.34", "chat templates")
def test_every_form_of_sample_gives_the_tokenizers_ids(tokenizer):
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    want = tokenizer.apply_chat_template(messages, return_dict=False)
    got = sample_ids(["你好", messages, [5, 6], torch.tensor([7, 8])], tokenizer, 1664)
    assert [ids.tolist() for ids in got] == [tokenizer("你好")["input_ids"], want, [5, 6], [7, 8]]
    long = sample_ids([list(range(3)) * 1000], None, 320)
    assert [len(ids) for ids in long] == [2048, 952]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"calibration": "text"}, "calibration='text': give a list of samples"),
        ({"calibration": []}, r"calibration=\[\]: give a list"),
        ({"calibration": [[]]}, "the 1 items of calibration are empty"),
        ({"calibration": ["text"]}, r"calibration\[0\]: texts and messages need a tokenizer"),
        ({"calibration": [[1], [{"role": "user", "content": "x"}]]}, r"calibration\[1\]: texts and messages need"),
        ({"calibration": [[1, 320]]}, r"calibration\[0\] has ids from 1 to 320, but .* 0 to 319: .*tokenizer"),
        ({"calibration": [[0.5]]}, r"calibration\[0\]: \[0.5\] is not a text, a list of messages or a list of token"),
        ({"calibration": [[[1, 2]]]}, r"calibration\[0\]: \[\[1, 2\]\] is not a text"),
        ({"calibration": [5]}, r"calibration\[0\]: 5 is not a text"),
        ({"calibration": [[1]], "empty_init": True}, "calibration needs the values of the weights"),
        ({"tokenizer": "tokenizer"}, "tokenizer is for the texts of calibration, but calibration is None"),
    ],
)
def test_bad_samples_are_refused_before_anything_is_changed(make_model, options, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model.quantize(4, **options)
    assert not any(hasattr(layer, "weight_scale") for layer in linears(model).values())


def test_prefix_and_inputs_that_overflow_are_refused(make_model):
    with pytest.raises(ValueError, match="pre_seq_len=4: calibrate the model without its P-Tuning prefix"):
        make_model(pre_seq_len=4).quantize(4, calibration=SAMPLES)
    model = make_model()
    model.transformer.encoder.layers[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="layers.1.self_attention.query_key_value: its inputs are nan or inf"):
        model.quantize(4, calibration=SAMPLES)
    assert model.config.quantization_bit == 4 and hasattr(
        linears(model)["transformer.encoder.layers.0.mlp.dense_h_to_4h"], "weight_scale"
    )


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command():
    """export/quantize.py's main."""
    import quantize

    return quantize.main


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "samples.txt"
    path.write_text(
        "\n\n".join(f"第 {i} 段。你好，世界！\nHello, world number {i}." for i in range(40)), encoding="utf-8"
    )
    return path


def stored(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.needs_transformers("4.31", "saving the code of a model along with it")
def test_command_writes_what_the_call_gives(command, text_file, tmp_path, tokenizer, capsys):
    """By rounding, by search and by calibration: each as model.quantize, beside tokenizer and code that load it."""
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from samples import read_samples

    samples = read_samples(text_file, tokenizer, 20)
    assert len(samples) == 20 == len({tuple(ids) for ids in samples}) and samples == read_samples(
        text_file, tokenizer, 20
    )
    kinds = {
        (): {},
        ("--scale", "mse"): {"scale": "mse"},
        ("--calibration", str(text_file), "--samples", "20"): {"calibration": samples},
    }
    for i, (arguments, options) in enumerate(kinds.items()):
        target = tmp_path / "new" / str(i)
        command([str(TINY), str(target), "--device", "cpu", *arguments])
        assert f"{target}: int4, 3.0 MB of weights" in capsys.readouterr().out
        want = ChatGLMForConditionalGeneration.from_pretrained(TINY).half().quantize(4, **options).state_dict()
        got = stored(target)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
        assert (target / "tokenizer.model").is_file() and (target / "quantization_calibration.py").is_file()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["0", "1", "2"]  # no folder of what is done


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{tiny}", "{tmp}"], "exists: give a new folder, or an empty one"),
        (["{tmp}", "{tmp}/new"], "has no config.json"),
        (["{tiny}", "{tmp}/new", "--calibration", "{tmp}/nothing"], "No such file.*nothing"),
        (["{tiny}", "{tmp}/new", "--calibration", "{tiny}/dialogues.jsonl"], 'line 1: expected {"messages"'),
        (["{tiny}", "{tmp}/new", "--calibration", "{tmp}/empty"], "empty is empty: give a few hundred samples"),
        (["{tiny}", "{tmp}/new", "--calibration", "{tmp}/empty", "--scale", "mse"], "leave out --scale"),
        (["{tiny}", "{tmp}/new", "--samples", "0"], "give 1 or more, not 0"),
    ],
)
def test_command_refuses_before_it_reads_a_weight(command, arguments, message, tmp_path, monkeypatch, capsys):
    import quantize

    monkeypatch.setattr(quantize, "load_model", None)
    (tmp_path / "empty").touch()
    with pytest.raises(SystemExit) as stopped:
        command([argument.format(tiny=TINY, tmp=tmp_path) for argument in arguments])
    assert re.search(message, str(stopped.value) + capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_command_asks_for_room_on_the_disk(command, tmp_path, monkeypatch):
    import quantize

    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=3_000_000))
    with pytest.raises(SystemExit, match=f"{tmp_path} has 0.0 GB left, but the files take 0.0 GB: make room there"):
        command([str(TINY), str(tmp_path / "new" / "folder")])


def test_what_a_stopped_calibration_left_needs_no_room_again(tmp_path, monkeypatch):
    import quantize
    from checkpoints import load_config

    progress, check = tmp_path / "progress", (load_config(TINY), torch.float16, 4, tmp_path / "new")
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=4_000_000))
    quantize.check_room(*check)  # 3 MB
    with pytest.raises(OSError, match="make room"):
        quantize.check_room(*check, progress)
    progress.mkdir()
    (progress / "layer.pt").write_bytes(bytes(3_000_000))
    quantize.check_room(*check, progress)


@pytest.mark.needs_transformers("4.34", "chat templates")
def test_conversations_are_samples(tokenizer):
    from conftest import ROOT
    from samples import read_samples

    rows = read_samples(ROOT / "finetune" / "messages.jsonl", tokenizer)
    assert rows and all(message.keys() >= {"role", "content"} for row in rows for message in row)
    assert sum(len(ids) for ids in sample_ids(rows, tokenizer, 1664)) > 20
