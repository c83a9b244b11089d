"""Committed checkpoints to Hugging Face folders."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from megablip.checkpoint import writer
from megablip.checkpoint.commit import CheckpointStore, problems
from megablip.checkpoint.export import ExportReader, base_of, file_hash, first_weights
from megablip.checkpoint.slices import rank_file, write_slices
from megablip.config import dump_config, parse_config
from megablip.convert import sources
from megablip.convert.to_hf import zero_to_hf
from megablip.errors import CheckpointError, ConfigError
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.records import MASTER, MOMENTS, LocalSlice
from tests.checkpoint.alone import Alone
from tests.minimal import RECIPE
from tests.model.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder a run began with."""
    folder = tmp_path_factory.mktemp("start")
    tiny_model().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"model")
    return folder


@pytest.fixture(scope="module")
def trained():
    """fp32 weights as training could leave them, by name; none as it was."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: value.shape for name, value in tiny_model().named_parameters()}
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        if not name.startswith("vision_tower.")
    }


@pytest.fixture
def run_dir(tmp_path, start, trained):
    return make_run(tmp_path / "run", start, trained)


def make_run(folder, start, weights, moments=None, **model):
    """A run directory with one committed checkpoint of `weights`; `moments` are their first ones, of some."""
    folder.mkdir()
    config = parse_config(RECIPE | {"run_dir": str(folder), "model": {"path": str(start)} | model}, "test")
    (folder / "config.yaml").write_text(dump_config(config))
    slices = [
        LocalSlice(
            name,
            tuple(value.shape),
            0,
            value.numel(),
            {MASTER: value.flatten().clone()} | ({MOMENTS[0]: moments[name]} if name in (moments or {}) else {}),
        )
        for name, value in weights.items()
    ]
    base = base_of(ExportReader(start), Blip3Config.from_pretrained(start))
    trainer_state = {"base": base, "config": config.model_dump(mode="json", by_alias=True)}
    CheckpointStore(folder / "checkpoints", 2, Alone()).save(
        3,
        lambda path: write_slices(path, slices, {}),
        {0: np.zeros(1)},
        trainer_state,
    )
    return folder


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_export_equals_the_trained_weights(tmp_path, run_dir, start, trained, dtype, torch_dtype):
    zero_to_hf(run_dir, tmp_path / "out", dtype)
    frozen = load_file(start / "model.safetensors")
    expected = {name: trained.get(name, value).to(torch_dtype) for name, value in frozen.items()}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(expected)
    assert any(name.startswith("vision_tower.") for name in written)
    for name, value in written.items():
        assert value.dtype == torch_dtype
        assert torch.equal(value, expected[name]), name
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"model"
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch_dtype
    for name, value in loaded.named_parameters():
        assert torch.equal(value, expected[name]), name


def test_a_trained_tower_comes_from_the_checkpoint_and_its_pooling_head_from_the_start(tmp_path):
    config = tiny_config()
    config.vision_config.vision_use_head = True
    start = tmp_path / "start"
    Blip3ForConditionalGeneration(config).save_pretrained(start)
    (start / "tokenizer.json").write_text("{}")
    trained = {
        name: torch.randn(value.shape)
        for name, value in Blip3ForConditionalGeneration(config, train_tower=True).named_parameters()
    }
    zero_to_hf(make_run(tmp_path / "run", start, trained, train_tower=True), tmp_path / "out")
    written, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(start / "model.safetensors")
    assert set(written) == set(before)
    for name, value in written.items():
        assert torch.equal(value, trained[name] if name in trained else before[name]), name
        assert (name in trained) is not name.startswith("vision_tower.head."), name
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, written[name]), name
    frozen = {name: value for name, value in trained.items() if not name.startswith("vision_tower.")}
    with pytest.raises(CheckpointError, match=r"for example vision_tower\."):
        zero_to_hf(make_run(tmp_path / "half", start, frozen, train_tower=True), tmp_path / "other")


def test_the_grids_of_the_stage_are_those_of_the_export(tmp_path, start, trained):
    zero_to_hf(make_run(tmp_path / "run", start, trained, grids=[[3, 1]]), tmp_path / "export")
    assert AutoConfig.from_pretrained(tmp_path / "export").grids == [[3, 1]]


def test_one_checkpoint_can_be_named_by_a_relative_path(tmp_path, run_dir, monkeypatch):
    monkeypatch.chdir(run_dir / "checkpoints" / "step_00000003")
    zero_to_hf(Path("."), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_large_model_is_written_in_several_files(tmp_path, run_dir, monkeypatch):
    zero_to_hf(run_dir, tmp_path / "one")
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    zero_to_hf(run_dir, tmp_path / "many")
    files = list((tmp_path / "many").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    one, many = ExportReader(tmp_path / "one"), ExportReader(tmp_path / "many")
    assert one.names == many.names
    total = 0
    for name in one.names:
        shape = one.shape(name)
        count = math.prod(shape)
        total += count * 4
        assert torch.equal(one.read(name, MASTER, shape, 0, count), many.read(name, MASTER, shape, 0, count))
    assert index["metadata"]["total_size"] == total
    for file in files:
        assert len(load_file(file)) == 1 or file.stat().st_size < 25_000
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "many")
    for name, value in load_file(tmp_path / "one" / "model.safetensors").items():
        assert torch.equal(loaded.get_parameter(name), value)


def test_an_output_that_exists_is_left_alone(tmp_path, run_dir):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        zero_to_hf(run_dir, output)
    assert [path.name for path in output.iterdir()] == ["mine"]


def test_an_unknown_dtype_is_refused(tmp_path, run_dir):
    with pytest.raises(ConfigError, match="unknown dtype 'int8'") as caught:
        zero_to_hf(run_dir, tmp_path / "out", "int8")
    assert "bf16" in caught.value.remedy


def test_a_changed_base_is_refused(tmp_path, start, trained):
    base = tmp_path / "base"
    base.mkdir()
    for path in start.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    run_dir = make_run(tmp_path / "run", base, trained)
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="no longer those the run began with") as caught:
        zero_to_hf(run_dir, tmp_path / "out")
    assert str(base) in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["missing", "spare"])
def test_weights_that_do_not_fit_the_model_are_refused(tmp_path, start, trained, change):
    weights, name = dict(trained), "spare"
    if change == "missing":
        name, _ = weights.popitem()
    else:
        weights[name] = torch.zeros(3)
    run_dir = make_run(tmp_path / "run", start, weights)
    with pytest.raises(CheckpointError, match=f"differ in 1 weights, for example {name}"):
        zero_to_hf(run_dir, tmp_path / "out")


def test_a_damaged_checkpoint_is_refused(tmp_path, run_dir):
    path = run_dir / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors has another SHA-256"):
        zero_to_hf(run_dir, tmp_path / "out")


def test_moments_are_neither_read_nor_hashed_for_the_weights(tmp_path, start, trained):
    """What they suffer is for `verify` and for a resumed run to find."""
    moments = {"sampler.latents": torch.full_like(trained["sampler.latents"], 0.5).flatten()}
    run_dir = make_run(tmp_path / "run", start, trained, moments)
    folder = run_dir / "checkpoints" / "step_00000003"
    path = folder / "rank_00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert list(problems(folder)) == ["rank_00000.safetensors has another SHA-256 than when it was written"]
    zero_to_hf(run_dir, tmp_path / "out")
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"its tensors end at byte {len(content)}"):
        zero_to_hf(run_dir, tmp_path / "other")


def test_a_run_without_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        zero_to_hf(tmp_path, tmp_path / "out")


def test_a_disk_that_is_full_leaves_no_output(tmp_path, run_dir, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            zero_to_hf(run_dir, tmp_path / "out")
    assert "free space" in caught.value.remedy
    assert not list(tmp_path.glob("out*"))
    zero_to_hf(run_dir, tmp_path / "out")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks(tmp_path, start, trained, world, monkeypatch):
    """ZeRO-3's cut of each parameter, which no size here divides."""
    run_dir = make_run(tmp_path / "run", start, trained)
    folder = run_dir / "checkpoints" / "step_00000003"
    for rank in range(world):
        slices = []
        for name, value in trained.items():
            width = -(-value.numel() // world)
            low, high = min(rank * width, value.numel()), min((rank + 1) * width, value.numel())
            slices.append(LocalSlice(name, tuple(value.shape), low, high, {MASTER: value.flatten()[low:high].clone()}))
        write_slices(folder / rank_file(rank), slices, {})
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_hash(path)}
        for path in folder.iterdir()
        if path.name not in ("manifest.json", "COMMITTED")
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    (folder / "COMMITTED").write_text(file_hash(folder / "manifest.json"))
    monkeypatch.setattr(sources, "CHUNK", 101)
    zero_to_hf(run_dir, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in trained.items():
        assert torch.equal(written[name], value), name


def test_native_to_hf_to_native_is_bit_for_bit(tmp_path, run_dir, trained):
    """A stage that starts from an export begins with the masters that the stage before ended with."""
    zero_to_hf(run_dir, tmp_path / "one")
    begin = first_weights(ExportReader(tmp_path / "one"), seed=0)
    again = {name: begin(name, MASTER, tuple(v.shape), 0, v.numel()).view(v.shape) for name, v in trained.items()}
    for name, value in trained.items():
        assert torch.equal(again[name], value), name
    zero_to_hf(make_run(tmp_path / "next", tmp_path / "one", again), tmp_path / "two")
    assert ExportReader(tmp_path / "one").hash() == ExportReader(tmp_path / "two").hash()
