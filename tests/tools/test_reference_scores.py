"""Scores that are stored beside the shards are those of the forward that they save; others are refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megablip.checkpoint.export import ExportReader, base_of, first_weights, load_tower
from megablip.config import Config
from megablip.data.loader import Loader
from megablip.data.reference import scores_path
from megablip.engine.objective import PreferenceObjective, objective_of
from megablip.errors import ShardError
from megablip.model.blip3 import Blip3Config
from megablip.model.preference import PREFERENCE_SUMS
from megablip.model.trained import trained_part
from megablip.model.vision import encode_tiles
from megablip.records import MASTER
from tests.data.builders import write_tar
from tests.preference_stage import PAIRS, make_stage, pair
from tools import reference_scores
from tools.reference_scores import score_shards


class Engine:
    """As ZeroEngine, of one process; its adapters do something."""

    def __init__(self, config: Config):
        self.module = trained_part(Blip3Config.of_run(config.model), config.model)
        begin = first_weights(ExportReader(config.model.path), 0)
        torch.manual_seed(0)
        for name, p in self.module.named_parameters():
            p.data.copy_(begin(name, MASTER, tuple(p.shape), 0, p.numel()).view(p.shape))
            if ".lora_B." in name:
                torch.nn.init.normal_(p, std=0.3)

    def __call__(self, **inputs):
        return self.module(**inputs)


@pytest.fixture
def stage(tmp_path):
    return make_stage(tmp_path)


@pytest.fixture
def scored(stage):
    assert score_shards(stage).startswith(f"{PAIRS} pairs scored, 0 were known, 1 left out")
    return stage


def objective(config: Config, stored: bool = True) -> PreferenceObjective:
    config = changed(config, "preference", stored_reference=stored)
    model = Blip3Config.of_run(config.model)
    return objective_of(config, base_of(ExportReader(config.model.path), model), model.layout)


def changed(config: Config, section: str, **values) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def shards(config: Config) -> list[Path]:
    return sorted((Path(config.run_dir).parent / "pairs").glob("*.tar"))


def micro_batches(config: Config):
    with Loader(config, config.model.path, Blip3Config.of_run(config.model).layout, 0, 1, None) as loader:
        return [micro_batch for batch in islice(loader, 6) for micro_batch in batch.micro_batches]


def features(config: Config, micro_batch):
    vision = Blip3Config.of_run(config.model).vision_config
    tower = load_tower(ExportReader(config.model.path), vision, torch.float32, torch.device("cpu"))
    return encode_tiles(tower, micro_batch.tiles)


def first_pairs(config: Config):
    micro_batch = next(m for m in micro_batches(config) if m.pairs)
    return micro_batch, features(config, micro_batch)


def test_loss_and_gradient_are_those_of_the_forward_that_it_saves(scored):
    engine, asked, known = Engine(scored), objective(scored, stored=False), objective(scored)
    assert asked.sums == (*PREFERENCE_SUMS, "kl")
    assert known.sums == PREFERENCE_SUMS
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    pairs = 0
    for micro_batch in micro_batches(scored):
        found = []
        for one in (asked, known):
            engine.module.zero_grad()
            losses, sums = one(engine, micro_batch, features(scored, micro_batch))
            losses.loss.backward()
            found.append((sums[: len(PREFERENCE_SUMS)], [p.grad.clone() for p in trained]))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        assert bool(found[0][0].any()) == bool(micro_batch.pairs)
        pairs += micro_batch.pairs
    assert pairs >= PAIRS


def test_what_is_known_is_not_asked_again_and_parts_share_the_shards(stage):
    first, second = shards(stage)
    score_shards(stage, 1, 2)
    assert [Path(scores_path(str(shard))).exists() for shard in (first, second)] == [False, True]
    before = Path(scores_path(str(second))).read_bytes()
    assert score_shards(stage).startswith("7 pairs scored, 7 were known, 1 left out")
    assert Path(scores_path(str(second))).read_bytes() == before
    assert len(Path(scores_path(str(first))).read_text().splitlines()) == 1 + 7


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("data", {"sequence_length": 192}, "another packing rule, which differs in sequence_length"),
        ("data", {"max_tiles": 12}, "another packing rule, which differs in max_tiles"),
        ("model", {"grids": []}, "another packing rule, which differs in layout"),
        ("engine", {"precision": "bf16"}, "another packing rule, which differs in precision"),
    ],
)
def test_scores_by_another_rule_are_refused(scored, section, values, words):
    with pytest.raises(ShardError, match=words) as caught:
        objective(changed(scored, section, **values))
    assert "tools.reference_scores" in caught.value.remedy
    assert scores_path(str(shards(scored)[0])) in caught.value.where
    with pytest.raises(ShardError, match=words):
        score_shards(changed(scored, section, **values))


def test_scores_by_another_base_are_refused(scored):
    weights = Path(scored.model.path) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ShardError, match="another base, which differs in model"):
        objective(scored)


def test_scores_of_a_shard_that_changed_are_refused(scored):
    shard = shards(scored)[1]
    write_tar(shard, [pair(number) for number in range(20)])
    with pytest.raises(ShardError, match="the shard has changed"):
        objective(scored)


def test_a_pair_that_is_not_the_one_scored_is_refused(scored):
    source = scored.data.sources[0].model_copy(update={"system_prompt": "one"})
    another = changed(scored, "data", sources=[source])
    engine, known = Engine(another), objective(another)
    with pytest.raises(ShardError, match="the pair is not the one scored") as caught:
        known(engine, *first_pairs(another))
    assert "source pairs, key p" in caught.value.where


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda path: path.unlink(), "has no scores of the reference beside it"),
        (lambda path: path.write_text(path.read_text()[:-20]), "can't be read: JSONDecodeError"),
        (lambda path: path.write_text(path.read_text().replace('"chosen"', '"chose"')), "can't be read: KeyError"),
        (lambda path: path.write_text(""), "can't be read"),
        (lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 9')), "are of version 9"),
    ],
)
def test_scores_that_are_lost_or_damaged_are_named(scored, edit, words):
    path = Path(scores_path(str(shards(scored)[1])))
    edit(path)
    with pytest.raises(ShardError, match=words) as caught:
        objective(scored)
    assert str(shards(scored)[1]) in caught.value.where


def test_a_pair_without_a_score_is_named(scored):
    for shard in shards(scored):
        path = Path(scores_path(str(shard)))
        path.write_text(path.read_text().splitlines()[0] + "\n")
    known = objective(scored)
    with pytest.raises(ShardError, match="the pair has no score"):
        known(Engine(scored), *first_pairs(scored))


def test_keys_are_distinct(stage):
    write_tar(shards(stage)[1], [pair(0)])
    score_shards(stage)
    with pytest.raises(ShardError, match="two samples of source pairs have the key p00"):
        objective(stage)


def test_remote_shards_have_none(scored):
    sources = [scored.data.sources[0].model_copy(update={"shards": "memory://pairs/a.tar"})]
    with pytest.raises(ShardError, match="can't lie beside a remote shard"):
        objective(changed(scored, "data", sources=sources))


def test_the_command(stage):
    recipe = str(Path(stage.run_dir).parent / "recipe.yaml")
    app = reference_scores.typer.Typer()
    app.command()(reference_scores.main)
    assert f"{PAIRS} pairs scored" in CliRunner().invoke(app, [recipe]).output
    head = json.loads(Path(scores_path(str(shards(stage)[0]))).read_text().splitlines()[0])
    assert set(head["base"]) == {"model", "tokenizer", "sampler"}
    wrong = CliRunner().invoke(app, [recipe, "stage=sft"])
    assert (wrong.exit_code, "for the stage dpo" in wrong.output) == (1, True)
    assert CliRunner().invoke(app, [recipe, "--part", "2/2"]).exit_code == 2
