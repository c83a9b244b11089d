"""What the comparisons train, from what, and how several seeds are summed up."""

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from megablip.config import Duration, load_config
from megablip.pages import write_page
from tools.miniature import ablations
from tools.miniature.ablations import ABLATIONS, DIFFERENCES, Compared, Contrast, mean_and_half_width, stages
from tools.miniature.chain import FULL, TINY
from tools.miniature.claims import Claim
from tools.miniature.medians import main, medians
from tools.miniature.tasks import CONVERSATIONS


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("size", [FULL, TINY], ids=["full", "tiny"])
def test_variants_differ_in_what_they_say_alone(tmp_path, name, size):
    found = stages(tmp_path, name, 3, size)
    for variant in ABLATIONS[name].variants:
        own = {stage.name.rsplit(": ", 1)[-1]: stage for stage in found if f": {variant.name}: " in stage.name}
        words = [word for word in own["pretrain"].command if "=" in word]
        config = load_config(next(word for word in own["pretrain"].command if word.endswith("pretrain.yaml")), words)
        assert config.engine.ranks == 1
        assert config.seed == 4
        assert config.model.path == str(own["start"].output)
        if size is FULL:
            duration = next(word for word in reversed(variant.overrides) if word.startswith("duration="))
            assert config.duration == Duration.model_validate(duration.removeprefix("duration="))
        settings = yaml.safe_load(own["start"].reads[0].read_text())
        for key, value in variant.model.items():
            assert settings[key] == (value if key != "sampler" else settings[key] | value)
        last = own["sft" if variant.tune else "pretrain"]
        assert str(last.output) + "_model" in own["ask"].command


@pytest.mark.parametrize("name", ABLATIONS)
def test_two_variants_share_the_clock_and_nothing_else(tmp_path, name):
    found = [stage for stage in stages(tmp_path, name, 0) if stage.name.startswith(f"{name}: ")]
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert one.beside
        assert not other.beside
        assert one.name.rsplit(": ", 1)[-1] == other.name.rsplit(": ", 1)[-1]
    assert len({stage.output for stage in found}) == len(found)


def test_all_comparisons_of_a_seed_share_their_parts(tmp_path):
    shared = [stages(tmp_path, name, 1)[:3] for name in ABLATIONS]
    assert len(list(groupby(shared))) == 1
    assert [stage.name for stage in shared[0]] == ["tower", "data", "tokenizer"]


@pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS)
def test_contrasts_are_between_variants_and_of_what_is_asked(ablation):
    names = {variant.name for variant in ablation.variants}
    for contrast in ablation.contrasts:
        assert {contrast.one, contrast.other} <= names
        assert contrast.figure in ablation.figures


def test_a_difference_is_taken_seed_by_seed():
    seeds = [{"a": {"read": 0.9}, "b": {"read": 0.5}}, {"a": {"read": 0.4}, "b": {"read": 0.6}}]
    assert Contrast("read", "a", "b").values(seeds) == [pytest.approx(0.4), pytest.approx(-0.2)]


def test_what_was_found_is_shown_and_what_was_not_run_is_named(tmp_path):
    assert Compared.read("instruction", tmp_path) is None
    asked = ABLATIONS["instruction"].figures
    found = {"perceiver": dict.fromkeys(asked, 0.5), "instruction-aware": dict.fromkeys(asked, 0.75)}
    (tmp_path / "instruction.json").write_text(json.dumps({"claim": "", "seeds": [found, found]}))
    compared = Compared.read("instruction", tmp_path)
    assert compared.variants[0] == ("perceiver", *["0.500 ± 0.000"] * len(asked))
    assert compared.differences[0] == (
        "read", "instruction-aware", "perceiver", "+0.250", "0.250 ± 0.000", "", "", "+0.250, +0.250",
    )  # fmt: skip
    assert len(compared.differences[0]) == len(DIFFERENCES)
    nothing = dict.fromkeys(("claims", "stages", "tasks", "pictures"), ())
    comparisons = {"instruction": compared, "resolution": None}
    page = tmp_path / "report.html"
    write_page(
        page, "report.html.j2", folder=Path(ablations.__file__).parent, title="", comparisons=comparisons,
        differences=DIFFERENCES, **nothing,
    )  # fmt: skip
    assert page.read_text().count("0.250 ± 0.000") == len(asked)
    assert "python -m tools.miniature resolution" in page.read_text()


def test_interval():
    # Student's t: three values of 0.1, 0.2, 0.3 have 4.303 * 0.1 / sqrt(3).
    mean, half = mean_and_half_width([0.1, 0.2, 0.3])
    assert (mean, half) == (pytest.approx(0.2), pytest.approx(0.2484, abs=1e-4))


def test_what_is_asked_is_there():
    reading = {"ocr_one_tile", "ocr_three_tiles", "ocr_straddling", "shots"}
    assert {task for ablation in ABLATIONS.values() for task in ablation.tasks} <= reading | {*CONVERSATIONS}


def claims(*values):
    goals = ({"at_least": 0.5}, {"at_most": 0.1})
    return [Claim("sft", "", f"figure {place}", v, **goals[place]) for place, v in enumerate(values)]


def test_medians_decide():
    found = medians([claims(0.4, 0.0), claims(0.6, 0.3), claims(0.5, 0.2)])
    assert [claim.value for claim in found] == [0.5, 0.2]
    assert [claim.holds for claim in found] == [True, False]
    assert found[0].detail == "0.400, 0.600, 0.500"


def test_the_table_of_medians(tmp_path):
    app = typer.Typer()
    app.command()(main)
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder, value in zip(folders, (0.4, 0.6, 0.5), strict=True):
        (folder / "report").mkdir(parents=True)
        entries = [asdict(claim) | {"holds": claim.holds} for claim in claims(value, 0.05)]
        (folder / "report" / "claims.json").write_text(json.dumps(entries))
    printed = CliRunner().invoke(app, [str(folder) for folder in folders])
    assert "| sft | figure 0 | 0.500 | >= 0.50 | yes | 0.400, 0.600, 0.500 |" in printed.output
    missing = CliRunner().invoke(app, [str(tmp_path / "none")])
    assert missing.exit_code == 1
