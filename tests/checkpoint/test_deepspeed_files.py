"""DeepSpeed's own files, made by real runs of DeepSpeed, against the weights gathered in memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megablip.checkpoint.deepspeed_files import is_deepspeed, read_zero
from megablip.checkpoint.deepspeed_weights import DeepSpeedWeights
from megablip.checkpoint.writer import PRECISIONS
from megablip.convert.zero_files import zero_files_to_hf
from megablip.errors import CheckpointError, ConfigError
from megablip.records import MASTER, MOMENTS
from tests.checkpoint.deepspeed_side import FAST, GROUPS, STEPS
from tests.distributed.ranks import run_ranks

ALL = [
    {"name": f"zero{stage}_{precision}_{size}", "stage": stage, "precision": precision, "sub_group_size": size}
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for size in ((40, 10**9) if stage == 3 else (0,))
]
ALL += [
    {"name": "bf16_optimizer", "stage": 1, "precision": "bf16", "accumulate_fp32": True},
    {"name": "aligned", "stage": 2, "precision": "bf16", "zero": {"parameter_alignment": True}},
    {"name": "offload", "stage": 2, "precision": "fp32", "zero": {"offload_optimizer": {"device": "cpu"}}},
    {"name": "offload3", "stage": 3, "precision": "bf16", "zero": {"offload_optimizer": {"device": "cpu"}}},
    {"name": "without_frozen", "stage": 3, "precision": "fp32", "exclude_frozen": True},
    {"name": "plain", "stage": 2, "precision": "fp32"},
    {"name": "round_robin", "stage": 2, "precision": "fp32", "zero": {"round_robin_gradients": True}},
]
WRITE = "tests.checkpoint.deepspeed_side:write"


@pytest.fixture
def copied(deepspeed_files, tmp_path):
    """One of them, to be damaged."""
    return Path(shutil.copytree(deepspeed_files / "zero3_fp32", tmp_path / "copy"))


def check_state(folder):
    """Every master, moment, frozen parameter and buffer equals what was gathered in memory."""
    state = read_zero(folder)
    expected = load_file(folder / "expected.safetensors")
    for kind in (MASTER, *MOMENTS):
        found = {name: torch.full((torch.Size(shape).numel(),), torch.nan) for name, shape in state.shapes.items()}
        for fragment in state.fragments():
            part = found[fragment.name][fragment.start : fragment.end]
            assert part.isnan().all(), "two ranks hold it"
            part.copy_(fragment.values(kind))
        found |= {alias: found[name] for alias, name in state.shared.items()}
        wanted = {name.removesuffix(f"|{kind}"): v for name, v in expected.items() if name.endswith(f"|{kind}")}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value.flatten()), f"{name}|{kind}"
    assert (state.step, state.adam_step) == (STEPS, STEPS)
    for number, group in enumerate(GROUPS):
        assert {key: state.groups[number][key] for key in group} == group
    assert {name: state.group_of[name] for name in ("embed.weight", "square.weight")} == {
        "embed.weight": 0,
        "square.weight": 0,
    }
    assert (state.group_of["one"], state.group_of["norm.bias"]) == (1, 1)


def check_export(folder, output, dtype, *, frozen=True):
    zero_files_to_hf(folder, output, dtype)
    written = load_file(output / "model.safetensors")
    expected = {}
    for key, value in load_file(folder / "expected.safetensors").items():
        name, _, kind = key.partition("|")
        if kind in (MASTER, "buffer") or (kind == "frozen" and frozen):
            expected[name] = value.to(PRECISIONS[dtype]) if value.is_floating_point() else value
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert written[name].dtype == value.dtype
        assert torch.equal(written[name], value), name


@pytest.mark.parametrize("case", FAST, ids=lambda case: case["name"])
def test_what_is_read_equals_what_was_gathered(deepspeed_files, tmp_path, case):
    check_state(deepspeed_files / case["name"])
    check_export(deepspeed_files / case["name"], tmp_path / "hf", "fp32")
    check_export(deepspeed_files / case["name"], tmp_path / "half", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_at_every_world_size(tmp_path, world):
    """ZeRO-1, 2, 3 in both precisions and DeepSpeed's less usual layouts; about a minute each."""
    run_ranks(world, WRITE, str(tmp_path), ALL, timeout_s=600)
    plain = tmp_path / "plain" / "expected.safetensors"
    # DeepSpeed's own look-up of a master is wrong with this setting; the run is the plain one, bit for bit.
    shutil.copy(plain, tmp_path / "round_robin")
    for case in ALL:
        folder = tmp_path / case["name"]
        check_state(folder)
        for dtype in PRECISIONS:
            check_export(folder, tmp_path / "hf" / dtype / case["name"], dtype, frozen=not case.get("exclude_frozen"))


def test_the_command_needs_no_deepspeed(deepspeed_files, tmp_path):
    program = "import sys; sys.modules['deepspeed'] = None; from megablip.cli import main; main()"
    arguments = ["convert", "zero-to-hf", deepspeed_files / "zero3_fp32", tmp_path / "hf", "--dtype", "bf16"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    assert {value.dtype for value in load_file(tmp_path / "hf" / "model.safetensors").values()} == {
        torch.bfloat16,
        torch.int64,
    }


def test_stretches_of_a_tensor_cross_the_ranks_parts(deepspeed_files):
    weights = DeepSpeedWeights(read_zero(deepspeed_files / "zero3_fp32"))
    whole = load_file(deepspeed_files / "zero3_fp32" / "expected.safetensors")["middle.weight|fp32"].flatten()
    for start, end in ((0, 55), (0, 28), (28, 55), (20, 40), (54, 55), (7, 7)):
        assert torch.equal(weights.elements("middle.weight", start, end), whole[start:end])


def test_a_model_folder_gives_names_config_and_what_was_not_saved(deepspeed_files, tmp_path):
    like = tmp_path / "like"
    like.mkdir()
    weights = load_file(deepspeed_files / "zero3_fp32" / "expected.safetensors")
    names = {
        key.partition("|")[0]: torch.zeros_like(v) for key, v in weights.items() if key.endswith(("|fp32", "|frozen"))
    }
    del names["tied.weight"]
    save_file(names | {"tower.weight": torch.full((3,), 2.0)}, like / "model.safetensors")
    (like / "config.json").write_text("{}")
    (like / "notes.md").write_text("")
    zero_files_to_hf(deepspeed_files / "zero3_fp32", tmp_path / "hf", like=like)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == names.keys() | {"tower.weight"}
    assert torch.equal(written["embed.weight"], weights["embed.weight|fp32"])
    assert torch.equal(written["adapted.base.weight"], weights["adapted.base.weight|frozen"])
    assert written["tower.weight"].tolist() == [2, 2, 2]
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}

    save_file({name: v for name, v in names.items() if name != "one"}, like / "model.safetensors")
    with pytest.raises(CheckpointError, match="the model has no weight one"):
        zero_files_to_hf(deepspeed_files / "zero3_fp32", tmp_path / "other", like=like)
    save_file(names | {"one": torch.zeros(2)}, like / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"one is \(1,\) in the checkpoint and \(2,\) in the model"):
        zero_files_to_hf(deepspeed_files / "zero3_fp32", tmp_path / "other", like=like)
    assert not (tmp_path / "other").exists()


def test_a_prefix_of_the_names_can_be_taken_away(deepspeed_files):
    state = read_zero(deepspeed_files / "zero3_fp32")
    weights = DeepSpeedWeights(state.without_prefix("adapted."))
    assert {"lora_A.weight", "base.weight", "embed.weight", "tied.weight"} <= weights.shapes.keys()


def _change(folder, pattern, change):
    """Load a file, change its content, save it again."""
    (path,) = folder.glob(f"step/{pattern}")
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def _unlink(pattern):
    def act(folder):
        for path in folder.glob(f"step/{pattern}"):
            path.unlink()

    return act


def _cut(folder):
    path = folder / "step" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:3000])


def _of_four_ranks(folder):
    for rank in (2, 3):
        for kind in ("optim", "model"):
            name = "zero_pp_rank_{}_mp_rank_00_{}_states.pt"
            shutil.copy(folder / "step" / name.format(0, kind), folder / "step" / name.format(rank, kind))


def _renamed(folder):
    (folder / "step" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").rename(
        folder / "step" / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    )


def _both_precisions(folder):
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(folder / "step" / name, folder / "step" / f"bf16_{name}")


def _grown(content):
    content["param_shapes"][0]["embed.weight"] = torch.Size([13, 9])


def _later(content):
    content["global_steps"] = 9


def _adam_later(content):
    content["optimizer_state_dict"]["optimizer_state_dict"]["state"][1]["step"] += 1


def _no_moments(content):
    content["optimizer_state_dict"]["optimizer_state_dict"]["state"] = {}


def _zero2(content):
    content["optimizer_state_dict"]["zero_stage"] = 2


OPTIM, MODEL = "zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"
MODEL_0 = "zero_pp_rank_0_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_unlink(OPTIM), "rank 1 are missing"),
        (_unlink("zero_pp_rank_0_mp_rank_00_optim_states.pt"), "rank 0 are missing"),
        (_unlink("*_optim_states.pt"), "no ZeRO checkpoint of DeepSpeed called 'step'"),
        (_unlink(MODEL), f"{MODEL} is missing"),
        (_cut, "damaged"),
        (_of_four_ranks, "of a run of 2 ranks, but there are files of 4"),
        (_renamed, "tensor or pipeline parallelism"),
        (_both_precisions, "files of two checkpoints are mixed"),
        (lambda folder: _change(folder, MODEL_0, _grown), "need .* elements, but its vectors have"),
        (lambda folder: _change(folder, MODEL, _later), "different steps are mixed"),
        (lambda folder: _change(folder, OPTIM, _adam_later), "different steps are mixed"),
        (lambda folder: _change(folder, OPTIM, _no_moments), "no exp_avg of parameter group 0"),
        (lambda folder: _change(folder, OPTIM, _zero2), "of another ZeRO stage"),
        (lambda folder: _change(folder, OPTIM, dict.clear), "has no optimizer_state_dict"),
        (lambda folder: _change(folder, MODEL_0, dict.clear), "has no param_shapes"),
        (lambda folder: (folder / "latest").write_text("../step"), "no ZeRO checkpoint"),
        (lambda folder: (folder / "latest").unlink(), "no ZeRO checkpoint"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(copied, tmp_path, damage, reason):
    damage(copied)
    with pytest.raises(CheckpointError, match=reason) as caught:
        zero_files_to_hf(copied, tmp_path / "hf")
    assert caught.value.where
    assert caught.value.remedy
    assert not list(tmp_path.glob("hf*"))


def test_model_states_of_another_model_are_noticed_in_zero_2(deepspeed_files, tmp_path):
    folder = Path(shutil.copytree(deepspeed_files / "zero2_fp32", tmp_path / "copy"))

    def swap(content):
        shapes = content["param_shapes"][0]
        shapes["embed.weight"], shapes["middle.weight"] = shapes["middle.weight"], shapes["embed.weight"]

    _change(folder, "mp_rank_00_model_states.pt", swap)
    with pytest.raises(CheckpointError, match="not of one run"):
        read_zero(folder)


def test_a_dtype_that_is_unknown_is_refused(deepspeed_files, tmp_path):
    with pytest.raises(ConfigError, match="unknown dtype"):
        zero_files_to_hf(deepspeed_files / "zero3_fp32", tmp_path / "hf", "int8")


def test_a_folder_is_told_to_be_deepspeeds(deepspeed_files, tmp_path):
    assert is_deepspeed(deepspeed_files / "zero3_fp32")
    assert is_deepspeed(deepspeed_files / "zero3_fp32" / "step")
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "COMMITTED").write_text("")
    (tmp_path / "latest").write_text("step_00000001")
    assert not is_deepspeed(tmp_path)
