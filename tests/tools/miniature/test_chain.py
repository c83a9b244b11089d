"""What the miniature's chain runs, from what, and what it asks."""

from pathlib import Path

import pytest

from megablip.config import load_config
from megablip.errors import ConfigError
from tools.miniature.asking import all_answers, figures
from tools.miniature.chain import ASKED, FULL, STAGES, TINY, stages
from tools.miniature.claims import CONTROL
from tools.miniature.shards import held_out_exchanges
from tools.miniature.tasks import CONVERSATIONS, Asker

FOLDER = Path("/run")


def by_name(*arguments):
    return {stage.name: stage for stage in stages(FOLDER, *arguments)}


def options(stage):
    """`key=value` words of a command."""
    return dict(word.split("=", 1) for word in stage.command if "=" in word)


def test_each_stage_starts_from_the_export_of_the_one_before():
    chain = by_name(FULL, 0)
    before = ("start", *(f"{stage}_model" for stage in STAGES))
    for stage, model in zip(STAGES, before, strict=False):
        assert options(chain[stage])["model.path"] == str(FOLDER / model)
        assert chain[f"{stage}: convert"].output == FOLDER / f"{stage}_model"
    assert options(chain[CONTROL])["model.path"] == options(chain["dpo"])["model.path"]


def test_choosing_on_validation_digits_changes_questions_alone():
    test, validation = stages(FOLDER, FULL, 0), stages(FOLDER, FULL, 0, "validation")
    changed = [(one, other) for one, other in zip(test, validation, strict=True) if one.command != other.command]
    assert {one.name for one, _ in changed} == {f"{name}: ask" for name in ASKED} | {"report"}
    for one, other in changed:  # and neither takes the other's place
        assert other.name == f"{one.name}_validation"
        assert other.output == one.output.with_name(f"{one.output.name}_validation")
    trained = [stage.name for stage in test if not stage.name.endswith(("ask", "report"))]
    assert [stage.name for stage in test][: len(trained)] == trained, "so that what is trained counts as done"


def test_every_override_is_of_a_recipe():
    for size in (FULL, TINY):
        for name, stage in by_name(size, 3).items():
            if "train" in stage.command and name in (*STAGES, CONTROL):
                overrides = [word for word in stage.command if "=" in word]
                config = load_config(next(word for word in stage.command if str(word).endswith(".yaml")), overrides)
                assert config.run_dir == str(FOLDER / name)
                assert config.stage == ("sft" if name == CONTROL else name)


def test_what_is_asked_is_there():
    assert set(held_out_exchanges(Asker(None, None))) == set(CONVERSATIONS)
    assert set(ASKED) == {*STAGES, CONTROL}
    assert figures({}) == {}


def test_questions_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no questions of any task"):
        all_answers(None, tmp_path, 8)
    (tmp_path / "read-000000.tar").touch()
    with pytest.raises(ConfigError, match="no questions of reed") as caught:
        all_answers(None, tmp_path, 8, ["read", "reed"])
    assert caught.value.remedy == "there are read"
