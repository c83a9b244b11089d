"""DeepSpeed's files to committed checkpoints and to the universal format, without training."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megablip.checkpoint.commit import committed, open_checkpoint
from megablip.checkpoint.deepspeed_files import read_zero
from megablip.checkpoint.deepspeed_universal import read_universal
from megablip.checkpoint.slices import SliceReader
from megablip.config import parse_config
from megablip.convert.export_zero import export_zero
from megablip.convert.import_zero import import_zero
from megablip.errors import CheckpointError, ConfigError
from megablip.records import MASTER, MOMENTS
from tests.checkpoint.deepspeed_side import STEPS
from tests.minimal import RECIPE

LANES = {0: np.arange(3), 1: np.arange(4)}


@pytest.fixture
def model(deepspeed_files, tmp_path):
    """The folder that the DeepSpeed run could have begun with: its frozen weights, others for the rest."""
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {}
    for key, value in load_file(deepspeed_files / "zero3_fp32" / "expected.safetensors").items():
        name, _, kind = key.partition("|")
        if kind in (MASTER, "frozen") and name != "tied.weight":
            weights[name] = value if kind == "frozen" else torch.zeros_like(value)
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def config_of(run_dir, model, **optimizer):
    optimizer = {"lr": 0.001, "weight_decay": 0.1, "betas": (0.9, 0.999), **optimizer}
    return parse_config(
        RECIPE | {"run_dir": str(run_dir), "model": {"path": str(model)}, "optimizer": optimizer}, "test"
    )


def check(folder, state):
    """The checkpoint is committed, whole, and has the state's elements."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.step == checkpoint.trainer_state["progress"]["step"] == STEPS
    assert checkpoint.trainer_state["adam_step"] == STEPS
    assert {lane: values.tolist() for lane, values in checkpoint.lane_states().items()} == {
        lane: values.tolist() for lane, values in LANES.items()
    }
    reader = SliceReader(folder)
    assert reader.shapes == state.shapes
    for fragment in state.fragments():
        for kind in (MASTER, *MOMENTS):
            shape = state.shapes[fragment.name]
            found = reader.read(fragment.name, kind, shape, fragment.start, fragment.end)
            assert torch.equal(found, fragment.values(kind).float())


@pytest.mark.parametrize("case", ["zero1_bf16", "zero2_fp32", "zero3_fp32"])
def test_there_and_back_changes_no_element(deepspeed_files, tmp_path, model, case):
    state = read_zero(deepspeed_files / case)
    if case == "zero1_bf16":  # its frozen weights were rounded
        weights = load_file(model / "model.safetensors")
        save_file({name: value.bfloat16() for name, value in weights.items()}, model / "model.safetensors")
    config = config_of(tmp_path / "run", model)
    folder = import_zero(state, config, state.shapes, LANES, allow_changes=True)
    assert committed(tmp_path / "run" / "checkpoints") == [folder]
    check(folder, state)
    export_zero(folder, tmp_path / "universal")
    again = read_zero(tmp_path / "universal")
    assert (again.step, again.adam_step, again.shapes) == (STEPS, STEPS, state.shapes)
    assert {group["weight_decay"] for group in again.groups} == {0.0, 0.1}
    second = import_zero(again, config_of(tmp_path / "second", model), again.shapes, LANES)
    check(second, state)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero2_fp32", "zero3_fp32"])
def test_what_ds_to_universal_writes_is_read(deepspeed_files, tmp_path, case):
    """DeepSpeed's own converter; 20 seconds each."""
    from deepspeed.checkpoint import ds_to_universal

    source, output = deepspeed_files / case / "step", tmp_path / "universal"
    arguments = ["--input_folder", str(source), "--output_folder", str(output)]
    arguments += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ds_to_universal", *arguments])
        ds_to_universal.main(ds_to_universal.parse_arguments())
    state, expected = read_universal(output), load_file(source.parent / "expected.safetensors")
    assert (state.step, state.adam_step) == (STEPS, STEPS)
    assert state.groups == read_zero(source).groups
    for fragment in state.fragments():
        for kind in (MASTER, *MOMENTS):
            assert torch.equal(fragment.values(kind), expected[f"{fragment.name}|{kind}"].flatten())


def _shape(state, model):
    return {"trained": state.shapes | {"one": (2,)}}


def _more(state, model):
    return {"trained": state.shapes | {"extra": (2,)}}


def _fewer(state, model):
    return {"trained": {name: shape for name, shape in state.shapes.items() if name != "one"}}


def _other_frozen(state, model):
    weights = load_file(model / "model.safetensors")
    weights["adapted.base.weight"][3, 2] += 1
    save_file(weights, model / "model.safetensors")
    return {}


def _no_frozen(state, model):
    weights = load_file(model / "model.safetensors")
    del weights["adapted.base.bias"]
    save_file(weights, model / "model.safetensors")
    return {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_shape, r"one is \(1,\) there and \(2,\) in the model"),
        (_more, "extra is trained here, but not there"),
        (_fewer, "one is trained there, but not by the recipe"),
        (_other_frozen, "adapted.base.weight is frozen, but has other values"),
        (_no_frozen, r"adapted.base.bias \(11,\), frozen there, is not in the model"),
        (lambda state, model: {"allow_changes": False}, r"embed.weight had weight_decay 0\.1 and would have 0\.0"),
    ],
)
def test_another_model_or_optimizer_is_refused(deepspeed_files, tmp_path, model, change, reason):
    state = read_zero(deepspeed_files / "zero3_fp32")
    arguments = {"trained": state.shapes, "allow_changes": True} | change(state, model)
    with pytest.raises(CheckpointError, match=reason) as caught:
        import_zero(state, config_of(tmp_path / "run", model), lane_states=LANES, **arguments)
    assert caught.value.remedy
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_has_checkpoints_is_left_alone(deepspeed_files, tmp_path, model):
    state = read_zero(deepspeed_files / "zero2_fp32")
    config = config_of(tmp_path / "run", model)
    folder = import_zero(state, config, state.shapes, LANES, allow_changes=True)
    with pytest.raises(ConfigError, match="has checkpoints already"):
        import_zero(state, config, state.shapes, LANES, allow_changes=True)
    assert committed(folder.parent) == [folder]


def test_a_schedule_in_tokens_needs_their_number(deepspeed_files, tmp_path, model):
    state = read_zero(deepspeed_files / "zero2_fp32")
    config = config_of(tmp_path / "run", model, warmup="1000 tokens")
    with pytest.raises(ConfigError, match="counts tokens"):
        import_zero(state, config, state.shapes, LANES, allow_changes=True)
    folder = import_zero(state, config, state.shapes, LANES, allow_changes=True, tokens=5000)
    assert open_checkpoint(folder).trainer_state["progress"]["tokens"] == 5000


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_import_that_fails_leaves_nothing(deepspeed_files, tmp_path, model, monkeypatch, error):
    state = read_zero(deepspeed_files / "zero3_fp32")
    calls = []

    def fsync(file):
        calls.append(file)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        import_zero(state, config_of(tmp_path / "run", model), state.shapes, LANES, allow_changes=True)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "zero" / "one" / "exp_avg.pt").unlink(), "can't be read"),
        (lambda folder: torch.save({"param": torch.ones(2)}, folder / "zero" / "one" / "fp32.pt"), "not \\(1,\\)"),
        (lambda folder: torch.save({}, folder / "zero" / "one" / "fp32.pt"), "holds no parameter"),
        (lambda folder: torch.save(torch.tensor(9.0), folder / "zero" / "one" / "step.pt"), "different steps"),
        (lambda folder: [path.unlink() for path in folder.glob("*model_states.pt")], "model states of a rank"),
    ],
)
def test_a_damaged_universal_checkpoint_is_refused(deepspeed_files, tmp_path, model, damage, reason):
    state = read_zero(deepspeed_files / "zero2_fp32")
    folder = import_zero(state, config_of(tmp_path / "run", model), state.shapes, LANES, allow_changes=True)
    export_zero(folder, tmp_path / "universal")
    damage(tmp_path / "universal" / folder.name)
    with pytest.raises(CheckpointError, match=reason):
        read_zero(tmp_path / "universal")


def test_the_universal_files_are_those_that_torch_loads(deepspeed_files, tmp_path, model):
    state = read_zero(deepspeed_files / "zero3_fp32")
    folder = import_zero(state, config_of(tmp_path / "run", model), state.shapes, LANES, allow_changes=True)
    export_zero(folder, tmp_path / "universal")
    expected = load_file(deepspeed_files / "zero3_fp32" / "expected.safetensors")
    for name, shape in state.shapes.items():
        for kind in (MASTER, *MOMENTS):
            path = tmp_path / "universal" / folder.name / "zero" / name / f"{kind}.pt"
            loaded = torch.load(path, weights_only=True)["param"]
            assert loaded.shape == shape
            assert torch.equal(loaded, expected[f"{name}|{kind}"])
            assert path.stat().st_size < 4 * math.prod(shape) + 4000
