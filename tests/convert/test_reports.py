"""inspect, verify and diff, and the mean of checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megablip.checkpoint.commit import CheckpointStore
from megablip.checkpoint.export import ExportReader, base_of
from megablip.checkpoint.slices import write_slices
from megablip.cli import app
from megablip.config import dump_config, parse_config
from megablip.convert.average import average
from megablip.convert.diff import compare
from megablip.convert.kinds import open_weights
from megablip.convert.to_hf import zero_to_hf
from megablip.convert.verify import verify
from megablip.convert.xgenmm import hf_to_xgenmm
from megablip.errors import CheckpointError, ConfigError
from megablip.model.blip3 import Blip3ForConditionalGeneration
from megablip.records import MASTER, MOMENTS, LocalSlice
from tests.checkpoint.alone import Alone
from tests.convert.test_xgenmm import config as reference_config
from tests.minimal import RECIPE
from tests.model.tiny import tiny_config, tiny_model

STEPS = (3, 5, 8)


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in tiny_model().named_parameters()
        if not name.startswith("vision_tower.")
    }


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Three committed checkpoints with moments."""
    folder = tmp_path_factory.mktemp("run")
    start = folder / "start"
    tiny_model().save_pretrained(start)
    (start / "tokenizer.json").write_text("{}")
    config = parse_config(RECIPE | {"run_dir": str(folder), "model": {"path": str(start)}}, "test")
    (folder / "config.yaml").write_text(dump_config(config))
    state = {
        "base": base_of(ExportReader(start), tiny_config()),
        "config": config.model_dump(mode="json", by_alias=True),
        "progress": {"step": 0, "tokens": 12345},
        "world": 1,
    }
    store = CheckpointStore(folder / "checkpoints", 5, Alone())
    for step in STEPS:
        slices = [
            LocalSlice(name, tuple(value.shape), 0, value.numel(), dict.fromkeys((MASTER, *MOMENTS), value.flatten()))
            for name, value in values(step).items()
        ]
        slices = [replace(piece, tensors={k: v.clone() for k, v in piece.tensors.items()}) for piece in slices]
        store.save(step, lambda path, slices=slices: write_slices(path, slices, {}), {0: np.zeros(1)}, state)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.mark.parametrize("last", [2, 3])
def test_the_mean_of_the_last_checkpoints(tmp_path, run_dir, last):
    average(run_dir, tmp_path / "out", last)
    written, before = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(run_dir / "start" / "model.safetensors"),
    )
    models = [values(step) for step in STEPS[-last:]]
    for name, value in written.items():
        if name.startswith("vision_tower."):
            assert torch.equal(value, before[name])
        else:
            torch.testing.assert_close(value, sum(model[name] for model in models) / last)


def test_means_that_can_not_be(tmp_path, run_dir):
    with pytest.raises(CheckpointError, match="has 3 committed checkpoints, not 4"):
        average(run_dir, tmp_path / "out", 4)
    with pytest.raises(ConfigError, match="the mean of 1"):
        average(run_dir, tmp_path / "out", 1)


def test_inspect_shows_a_checkpoint_without_reading_tensors(tmp_path, run_dir):
    result = invoke("inspect", run_dir)
    assert result.exit_code == 0, result.output
    for words in ("step_00000008", "12,345", "pretrain", "sampler", "latents", "float32"):
        assert words in result.output
    result = invoke("inspect", run_dir / "start", "--depth", 1)
    assert "vision_tower" in result.output
    assert "latents" not in result.output
    count = sum(value.numel() for value in tiny_model().parameters())
    assert f"{count:,}" in result.output
    assert invoke("inspect", tmp_path).exit_code == 1


def test_verify_finds_nothing_in_what_is_whole(tmp_path, run_dir):
    zero_to_hf(run_dir, tmp_path / "out")
    for source in (run_dir, run_dir / "checkpoints" / "step_00000005", tmp_path / "out"):
        assert verify(source) == []
        assert invoke("verify", source).exit_code == 0


def test_verify_lists_all_that_is_wrong_with_a_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["sampler.latents"][0, :2] = torch.tensor([float("nan"), float("inf")])
    weights["other"] = weights.pop("sampler.norm.bias")
    weights["sampler.norm.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    assert sorted(verify(tmp_path)) == [
        "other is none of the model's",
        "sampler.latents: 2 values are not finite",
        "sampler.norm.bias is missing",
        f"sampler.norm.weight is (3,), by config.json {tuple(tiny_model().sampler.norm.weight.shape)}",
    ]
    result = invoke("verify", tmp_path)
    assert result.exit_code == 1
    assert "4 things are wrong" in result.output
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    assert "can't be read" in verify(tmp_path)[0]
    assert invoke("verify", tmp_path / "nowhere").exit_code == 1


def test_verify_lists_all_that_is_wrong_with_a_checkpoint(tmp_path, run_dir):
    folder = tmp_path / "step_00000008"
    shutil.copytree(run_dir / "checkpoints" / "step_00000008", folder)
    path = folder / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = np.array([np.nan], np.float32).tobytes()
    path.write_bytes(content)
    (folder / "data_state.npz").unlink()
    found = verify(folder)
    assert len(found) == 3
    assert "data_state.npz" in found[0]
    assert "another SHA-256" in found[1]
    assert "1 values are not finite" in found[2]


def test_diff_of_equal_and_of_unequal_checkpoints(tmp_path, run_dir):
    zero_to_hf(run_dir, tmp_path / "fp32")
    zero_to_hf(run_dir, tmp_path / "bf16", "bf16")
    assert invoke("diff", run_dir, tmp_path / "fp32").exit_code == 0
    result = invoke("diff", tmp_path / "fp32", tmp_path / "bf16")
    assert result.exit_code == 1
    assert "sampler.latents" in result.output
    assert invoke("diff", tmp_path / "fp32", tmp_path / "nowhere").exit_code == 2


def test_a_difference_is_told_exactly(tmp_path):
    one = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.zeros(2), "c": torch.zeros(2), "e": torch.tensor([torch.nan])}
    other = {
        "a": torch.tensor([1.0, 2.5, 2.0]),
        "b": torch.zeros(3),
        "d": torch.zeros(1),
        "e": torch.tensor([torch.nan]),
    }
    save_file(one, tmp_path / "one.safetensors")
    torch.save({"model_state_dict": other}, tmp_path / "other.pt")
    found = compare(*(open_weights(tmp_path / name) for name in ("one.safetensors", "other.pt")))
    assert (found.missing, found.extra, found.shapes) == (["c"], ["d"], {"b": ((2,), (3,))})
    assert found.values == {"a": (2, 1.0, 1 / 3)}


def test_released_names_are_compared_with_ours(tmp_path):
    torch.manual_seed(0)
    model = Blip3ForConditionalGeneration(reference_config())
    model.save_pretrained(tmp_path / "hf")
    hf_to_xgenmm(tmp_path / "hf", tmp_path / "released")
    for pair in (("hf", "released"), ("released", "hf")):
        result = invoke("diff", *(tmp_path / name for name in pair))
        assert result.exit_code == 0, result.output
    weights = load_file(tmp_path / "released" / "model.safetensors")
    weights["vlm.lang_model.lm_head.additional_fc.bias"][1] += 1
    weights["vlm.more"] = torch.zeros(1)
    save_file(weights, tmp_path / "released" / "model.safetensors")
    result = invoke("diff", tmp_path / "hf", tmp_path / "released")
    assert result.exit_code == 1
    assert "decoder.lm_head.bias" in result.output
    assert "more" in result.output
