"""Exports, read slice by slice."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from megablip.checkpoint import export
from megablip.checkpoint.export import ExportReader, file_hash, load_tower
from megablip.errors import CheckpointError
from megablip.records import MASTER
from tests.checkpoint.alone import Alone

SHAPES = {"bias": (7,), "matrix": (5, 3), "latents": (2, 3, 4), "conv": (4, 3, 2, 2)}


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write_sharded(folder, tensors):
    weight_map = {name: f"model-{number // 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    single, sharded, half = (tmp_path_factory.mktemp(name) for name in ("single", "sharded", "half"))
    save_file(weights(), single / "model.safetensors")
    write_sharded(sharded, weights())
    save_file(weights(torch.bfloat16), half / "model.safetensors")
    return {"single": single, "sharded": sharded, "half": half}


@given(
    kind=st.sampled_from(["single", "sharded", "half"]),
    name=st.sampled_from(list(SHAPES)),
    ends=st.tuples(st.integers(0, 48), st.integers(0, 48)),
)
@settings(deadline=None)
def test_any_stretch_equals_the_flat_tensor(folders, kind, name, ends):
    start, end = sorted(min(number, math.prod(SHAPES[name])) for number in ends)
    expected = weights(torch.bfloat16 if kind == "half" else torch.float32)[name].float().flatten()[start:end]
    read = ExportReader(folders[kind]).read(name, MASTER, SHAPES[name], start, end)
    assert read.dtype == torch.float32
    assert torch.equal(read, expected)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_names_and_shapes(folders, kind):
    reader = ExportReader(folders[kind])
    assert reader.names == sorted(SHAPES)
    assert {name: reader.shape(name) for name in reader.names} == SHAPES


def test_the_hash_depends_on_every_weight_file(tmp_path):
    write_sharded(tmp_path, weights())
    before = ExportReader(tmp_path).hash()
    assert ExportReader(tmp_path).hash() == before
    tensors = weights()
    tensors["conv"][0, 0, 0, 0] += 1
    write_sharded(tmp_path, tensors)
    assert ExportReader(tmp_path).hash() != before


def test_ranks_share_the_hashing(tmp_path, monkeypatch):
    write_sharded(tmp_path, weights())
    (tmp_path / "tokenizer.json").write_text("{}")
    alone, expected = ExportReader(tmp_path).hashes(Alone()), ExportReader(tmp_path).hash()
    assert alone == {"model": expected, "tokenizer": file_hash(tmp_path / "tokenizer.json")}
    hashed, real = [], file_hash
    monkeypatch.setattr(export, "file_hash", lambda path: hashed.append(path.name) or real(path))
    names = [*sorted(path.name for path in tmp_path.glob("*.safetensors")), "tokenizer.json"]
    parts = [{name: real(tmp_path / name) for name in names[rank::2]} for rank in range(2)]
    for rank in range(2):
        hashed.clear()
        topology = SimpleNamespace(rank=rank, world=2, gather=lambda mine: parts)
        assert ExportReader(tmp_path).hashes(topology) == alone
        assert hashed == names[rank::2]


def test_a_folder_without_weights_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no model weights") as caught:
            ExportReader(folder)
        assert "megablip convert" in caught.value.remedy


def test_a_weight_that_is_missing_or_of_another_shape_is_named(folders):
    reader = ExportReader(folders["single"])
    with pytest.raises(CheckpointError, match="the export has no weight head"):
        reader.read("head", MASTER, (2,), 0, 2)
    with pytest.raises(CheckpointError, match=r"matrix is \(5, 3\) in the export and \(3, 5\) in the model"):
        reader.read("matrix", MASTER, (3, 5), 0, 2)


def test_adapters_that_are_not_merged_are_told_from_a_weight_that_is_lost(tmp_path):
    save_file(
        {"o.base_layer.weight": torch.ones(2), "o.lora_A.default.weight": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"no weight o.weight, but adapters that are not merged") as caught:
        ExportReader(tmp_path).read("o.weight", MASTER, (2,), 0, 2)
    assert "merge_and_unload" in caught.value.remedy


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", "[" * 99_999, '{"weight_map": 5}', '{"weight_map": {"bias": "../x.safetensors"}}']
)
def test_a_broken_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index") as caught:
        ExportReader(tmp_path)
    assert "model.safetensors.index.json" in caught.value.where


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path):
    write_sharded(tmp_path, weights())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"bias": "model-9.safetensors", "conv": "model-0.safetensors"}}))
    reader = ExportReader(tmp_path)
    with pytest.raises(CheckpointError, match="can't be read") as caught:
        reader.read("bias", MASTER, (7,), 0, 7)
    assert "model-9.safetensors" in caught.value.where
    with pytest.raises(CheckpointError, match="conv"):
        reader.read("conv", MASTER, SHAPES["conv"], 0, 7)
    with pytest.raises(CheckpointError, match="can't be read"):
        reader.hash()


@pytest.mark.parametrize("keep", [0, 50, -1])
def test_a_cut_file_is_refused(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="can't be read") as caught:
        ExportReader(tmp_path)
    assert str(path) in caught.value.where


@pytest.mark.parametrize("pooling_head", [False, True])
def test_the_tower_is_loaded_frozen_without_its_pooling_head(tmp_path, pooling_head):
    config = SiglipVisionConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        vision_use_head=pooling_head,
    )  # fmt: skip
    tower = SiglipVisionModel(config)
    state = {f"vision_tower.{name}": value for name, value in tower.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_tower(ExportReader(tmp_path), config, torch.bfloat16, torch.device("cpu"))
    for name, parameter in loaded.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, tower.get_parameter(name).bfloat16())
        assert not name.startswith("head.")
    assert config.vision_use_head is pooling_head
    del state["vision_tower.post_layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the export has no weight vision_tower"):
        load_tower(ExportReader(tmp_path), config, torch.bfloat16, torch.device("cpu"))


def test_file_hash(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_hash(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
