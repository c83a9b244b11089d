import importlib
import json
import sys

import numpy as np
import pytest
import torch

from tools.bench import __main__ as command
from tools.bench import rivals, vision
from tools.bench.core import Rival, Row, median_seconds, run

FAST = Row("fast", 4.0, "ms", "lower", goal=2.0, rival=Rival("other", 10.0))
SLOW = Row("slow", 6.0, "ms", "lower", goal=2.0, rival=Rival("other", 10.0))


@pytest.mark.parametrize(
    ("row", "ratio", "goal", "ok"),
    [
        (FAST, 2.5, "ratio >= 2", True),
        (SLOW, 10 / 6, "ratio >= 2", False),
        (Row("rate", 30, "documents/s", "higher", 2, Rival("other", 10)), 3, "ratio >= 2", True),
        (Row("rate", 10, "documents/s", "higher", 2, Rival("other", 30)), 1 / 3, "ratio >= 2", False),
        (Row("time", 2, "s", "lower", 2), None, "<= 2 s", True),
        (Row("time", 2.1, "s", "lower", 2), None, "<= 2 s", False),
        (Row("rate", 50_000, "documents/s", "higher", 50_000), None, ">= 50,000 documents/s", True),
        (Row("fill", 0.98, "", "higher", 0.99), None, ">= 0.99", False),
        (Row("error", float("nan"), "", "lower", 0.1), None, "<= 0.1", False),
    ],
)
def test_a_row_judges_itself_by_its_goal(row, ratio, goal, ok):
    assert row.ratio == (ratio if ratio is None else pytest.approx(ratio))
    assert row.goal_text == goal
    assert row.ok is ok


def test_results_are_a_machine_line_tables_and_json_last(capsys):
    code = run({"good": lambda: [FAST], "mixed": lambda: [SLOW, FAST]})
    lines = capsys.readouterr().out.splitlines()
    assert "cores, torch " in lines[0]
    assert [line.strip() for line in lines if line.strip() in ("good", "mixed")] == ["good", "mixed"]
    assert any("2.50" in line and "ratio >= 2" in line and "ok" in line for line in lines)
    assert json.loads(lines[-1]) == {
        "good.fast": {"value": 4.0, "goal": "ratio >= 2", "ok": True},
        "mixed.slow": {"value": 6.0, "goal": "ratio >= 2", "ok": False},
        "mixed.fast": {"value": 4.0, "goal": "ratio >= 2", "ok": True},
    }
    assert code == 1


def test_all_goals_reached_is_exit_code_zero(capsys):
    assert run({"good": lambda: [FAST]}) == 0


def test_variants_take_turns():
    calls = []
    seconds = median_seconds({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=6)
    assert calls == ["a", "b"] * 7
    assert list(seconds) == ["a", "b"]


def test_the_median_leaves_out_the_warm_up_and_one_bad_moment(monkeypatch):
    now = [0.0]
    durations = iter([100, 1, 2, 500, 3, 2])
    monkeypatch.setattr("tools.bench.core.time.perf_counter", lambda: now[0])

    def variant():
        now[0] += next(durations)

    assert median_seconds({"it": variant}) == {"it": 2}


def test_both_sides_of_the_vision_bench_compute_the_same(monkeypatch):
    """At a small size; what it measures otherwise takes minutes."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(vision, "SIGLIP", vision.SIGLIP | small)
    monkeypatch.setattr(vision, "TILES", 3)
    monkeypatch.setattr(vision, "DECODER_WIDTH", 16)

    def once(sides):
        for side in sides.values():
            side()
        return dict.fromkeys(sides, 1.0)

    monkeypatch.setattr(vision, "median_seconds", once)
    rows = {row.name: row for row in vision.rows()}
    assert all(row.ok for row in rows.values())
    assert set(rows) == {f"{what}{of}" for what in ("sampler", "tower_and_sampler") for of in ("", "_gradient_error")}


def test_few_repeats_are_refused():
    with pytest.raises(ValueError, match="at least 5"):
        median_seconds({}, repeats=4)


def test_the_command_runs_one_bench_or_all(monkeypatch, capsys):
    monkeypatch.setattr(command, "rows_of", lambda name: [FAST])
    assert command.main(["cli"]) == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])) == ["cli.fast"]
    assert command.main(["all"]) == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])) == [f"{name}.fast" for name in command.BENCHES]


def test_help_lists_every_bench(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown and what in shown for name, what in command.BENCHES.items())


def test_an_unknown_bench_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["stpe"])
    assert ended.value.code == 2
    assert "step" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.BENCHES)
def test_every_bench_has_rows(name):
    assert callable(importlib.import_module(f"tools.bench.{name}").rows)


def test_the_packing_bench_packs_all_but_what_waits_at_the_end():
    packing = importlib.import_module("tools.bench.packing")
    documents = packing.documents_of("captions")[:1000]
    ours, flushed = packing.pack_all(documents), packing.flush_all(documents)
    assert {document for sequence in flushed for document in sequence} == set(documents)
    packed = [document for sequence in ours for document in sequence]
    assert len(set(packed)) == len(packed) >= 1000 - packing.BUFFER
    for sequence in (*ours, *flushed):
        assert sum(document.tokens for document in sequence) <= packing.SEQUENCE_LENGTH
    assert packing.fill_of(flushed) < packing.fill_of(ours) <= 1


def test_imbalance_is_the_largest_of_a_step_over_the_mean():
    packing = importlib.import_module("tools.bench.packing")
    tiles = np.full((packing.RANKS, 4), 10)
    assert packing.imbalance(tiles, 1) == 1
    tiles[0, 0] = 90  # the mean of that step is 20
    assert packing.imbalance(tiles, 1) == (4.5 + 3) / 4
    assert packing.imbalance(tiles, 4) == 120 / 50


def test_a_rivals_environment_is_made_once(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(rivals, "CACHE", tmp_path)
    monkeypatch.setattr(
        rivals, "call", lambda command: commands.append(command) or (tmp_path / "it").mkdir(exist_ok=True)
    )
    for _ in range(2):
        assert rivals.venv("it", ["first==1", "second"]) == tmp_path / "it/bin/python"
    assert [command[-1] for command in commands] == [str(tmp_path / "it"), "first==1", "second"]
    rivals.venv("it", ["second"])
    assert len(commands) == 5


def test_a_rival_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*no such thing"):
        rivals.call([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"])


def test_the_step_bench_would_notice_documents_that_see_each_other():
    step = importlib.import_module("tools.bench.step")
    model = step.demo_model()
    batch = step.demo_batch(model.config.layout)
    assert len(batch.doc_lens) == 24
    assert 40 <= sum(batch.doc_lens) / 24 <= 50
    features = torch.randn(*batch.patch_mask.shape, step.TOWER["hidden_size"], dtype=torch.bfloat16)

    def gradients(loss):
        step.step(model, loss)
        return step.gradients(model)

    packed = gradients(model(packed=batch, vision_features=features).loss / batch.valid_labels)
    model.decoder.set_attn_implementation("sdpa")
    assert step.relative_error(gradients(step.transformers_loss(model, batch, features)), packed) < 0.02
    batch.position_ids = torch.arange(len(batch.input_ids))
    assert step.relative_error(gradients(step.transformers_loss(model, batch, features)), packed) > 0.1


def test_the_overhead_of_a_step_is_what_is_not_the_model_with_data_ready():
    engine = importlib.import_module("tools.bench.engine")
    slow = {"time/step_s": 90.0, "time/forward_s": 90.0}
    step = {"data_wait": 5.0, "exchange": 0.5, "vision": 2.0, "forward": 2.0, "backward": 4.0, "optimizer": 1.0}
    point = {f"time/{name}_s": value for name, value in step.items()} | {"time/other_s": 0.5, "time/step_s": 15.0}
    points = [{"step": number, **(slow if number <= engine.WARM_UP_STEPS else point)} for number in range(1, 20)]
    parts = engine.split_of(points)
    assert parts == step | {"other": 0.5}
    assert engine.overhead_share(parts) == pytest.approx(1 / 10)


def test_the_laps_of_a_start_are_those_of_the_first_point(tmp_path):
    engine = importlib.import_module("tools.bench.engine")
    lines = [{"step": 1, "start/imports_s": 4.0, "start/first_step_s": 1.0, "loss": 6.0}, {"step": 2, "loss": 5.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert engine.first_step(tmp_path) == {"imports": 4.0, "first step": 1.0}
