"""Skipped steps, loss spikes and slow ranks. Each rank's part is given as its report."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from megablip.config import HealthConfig
from megablip.engine import health as module
from megablip.engine.health import HealthMonitor, SpikeDetector, StragglerReport
from megablip.engine.symmetry import StepReport, StepReports
from megablip.errors import DivergenceError
from tests.test_config import changed

SETUP = {"step": 1, "micro_batches": 1}


class Ranks:
    """The topology of the first of two ranks; the other one gives what it is told to."""

    rank, world, is_first, device = 0, 2, True, torch.device("cpu")

    def __init__(self, other=None):
        self.other, self.gathers = other, 0

    def gather(self, value):
        self.gathers += 1
        return [value, value if self.other is None else self.other]


def monitor(tmp_path, topology, start_step=0, **changes):
    said, notes = [], []
    config = changed(run_dir=str(tmp_path), **changes)
    found = HealthMonitor(config, topology, start_step, {}, said.append, lambda *note: notes.append(note))
    return found, said, notes


def batch(*keys):
    return SimpleNamespace(
        micro_batches=[SimpleNamespace(source=torch.tensor([0] * len(keys)), keys=list(keys), tiles=None)],
        data_wait_s=0.0,
    )


def review(found, **other):
    """What the next step's exchange brings, with the other rank's fields."""
    mine = found.flags()
    found.review(StepReports([StepReport(**SETUP, **mine), StepReport(**SETUP, **mine | other)]))


def events(tmp_path):
    return [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]


def test_a_healthy_step_costs_no_collective(tmp_path):
    topology = Ranks()
    found, said, _ = monitor(tmp_path, topology)
    before = topology.gathers
    for step in range(1, 30):
        found.observe(step, batch("a"), 2.0, applied=True)
        review(found)
    assert topology.gathers == before
    found.observe(30, batch("a"), 2.0, applied=True)
    found.close()
    assert topology.gathers == before + 1, "the last step's review has its own"
    assert said == []
    assert not (tmp_path / "health.jsonl").exists()


def test_a_skipped_step_is_written_down_with_the_rank_and_all_keys(tmp_path):
    found, said, notes = monitor(tmp_path, Ranks(other=["a/x", "a/y"]))
    scalars = found.observe(7, batch("k"), math.nan, applied=False)
    assert scalars["step_skipped"] == 1.0
    review(found, nonfinite=1)
    [event] = events(tmp_path)
    assert event == {
        "step": 7, "loss": None, "event": "skipped step", "cause": "loss not finite on rank 1",
        "nonfinite_ranks": [1], "keys": {"0": ["a/k"], "1": ["a/x", "a/y"]},
    }  # fmt: skip
    assert "step 7 skipped on all ranks: loss not finite on rank 1; samples: a/x, a/y" in said[0]
    assert notes == [(7, "health", said[0])]


def test_a_gradient_that_is_not_finite_has_no_rank(tmp_path):
    found, _, _ = monitor(tmp_path, Ranks())
    found.observe(1, batch("k"), 2.0, applied=False)
    found.close()
    assert events(tmp_path)[0]["cause"] == "gradient not finite"


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path):
    found, _, _ = monitor(tmp_path, Ranks(), health__max_skipped_in_a_row=2)
    for step, applied in enumerate([False, True, False], 1):
        found.observe(step, batch("k"), 2.0, applied=applied)
        review(found)
    found.observe(4, batch("k"), 2.0, applied=False)
    with pytest.raises(DivergenceError, match="2 steps in a row") as caught:
        review(found)
    assert "up to step 4" in caught.value.where
    assert len(events(tmp_path)) == 3


def test_preferred_answers_that_grow_rare_raise_one_alert(tmp_path):
    found, said, _ = monitor(tmp_path, Ranks())
    # down, a little up, down again (nothing new is told), then well up, and down: a second time
    for step, ratio in enumerate([-0.2] * 9 + [-3.0] * 9 + [-0.9] * 9 + [-3.0] * 9 + [0.0] * 9 + [-2.0] * 9, 1):
        found.observe(step, batch("k"), 0.3, applied=True, chosen_log_ratio=ratio)
    assert [event["event"] for event in events(tmp_path)] == ["preferred answers grow rare"] * 2
    assert [event["step"] for event in events(tmp_path)] == [12, 49]
    assert "at step 12 they are 1.25 nats a label less likely" in said[0]
    assert "preference.sft_weight" in said[0]


def test_lines_of_steps_that_are_done_again_are_taken_back(tmp_path):
    lines = [json.dumps({"step": step}) for step in (3, 9)]
    (tmp_path / "health.jsonl").write_text("\n".join([*lines, '{"step": 1']))
    monitor(tmp_path, Ranks(), start_step=5)
    assert events(tmp_path) == [{"step": 3}]


def test_a_loss_that_is_not_finite_poisons_the_gradient(tmp_path):
    found, _, _ = monitor(tmp_path, Ranks())
    for loss, expected in ((2.0, 0.5), (math.inf, math.nan), (math.nan, math.nan)):
        factor = found.factor(torch.tensor(loss), 0.5)
        assert factor.item() == expected or math.isnan(factor.item()) == math.isnan(expected)
    found.observe(1, batch("k"), math.nan, applied=False)
    assert found.flags()["nonfinite"] == 2


def test_a_factor_changes_no_bit(tmp_path):
    found, _, _ = monitor(tmp_path, Ranks())
    losses = torch.randn(1000)
    scale = 2 / 377
    assert all(torch.equal(loss * scale, loss * found.factor(loss, scale)) for loss in losses)


def test_a_spike_is_told_and_a_slope_is_not():
    generator = torch.Generator().manual_seed(0)
    detector = SpikeDetector(window=64, deviations=8.0)
    for step in range(400):
        noise = torch.randn((), generator=generator).item()
        loss = 8.0 * 0.995**step + 2 + 0.05 * noise
        spike = detector.add(loss + 3.0 if step in (10, 200, 201) else loss)
        assert (spike is not None) == (step in (200, 201)), f"step {step}: too early at 10, then each one"
    assert detector.add(math.inf)
    assert detector.add(2.9) is None, "an infinite loss moves nothing"


def test_a_spike_s_keys_are_written_down(tmp_path):
    found, said, _ = monitor(tmp_path, Ranks(), health__spike_window_steps=16)
    for step in range(1, 20):
        found.observe(step, batch("k"), 9.0 if step == 19 else 2.0 + step % 3 / 10, applied=True)
        review(found)
    [event] = events(tmp_path)
    assert (event["event"], event["step"], event["loss"]) == ("loss spike", 19, 9.0)
    assert event["keys"]["0"] == ["a/k"]
    assert "loss spike at step 19: 9.0000, the median was 2.05" in said[0]


def reports(local_s, data_s):
    return StepReports(
        [
            StepReport(**SETUP, local_us=int(1e6 * local), data_wait_us=int(1e6 * data), tiles=4)
            for local, data in zip(local_s, data_s, strict=True)
        ]
    )


def straggler(monkeypatch, ranks, seconds_per_step, **config):
    topology = SimpleNamespace(gather=lambda host: [f"node{rank}" for rank in range(ranks)])
    clock = iter(range(1000))
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock) * seconds_per_step)
    return StragglerReport(topology, HealthConfig(straggler_every_steps=1, **config))


def test_a_slow_rank_is_named_with_its_host(monkeypatch):
    found = straggler(monkeypatch, 4, seconds_per_step=1.0)
    assert found.add(reports([0.1] * 4, [0.0] * 4)) == []
    [line] = found.add(reports([0.1, 0.1, 0.5, 0.11], [0.0] * 4))
    assert "slow in compute: rank 2 on node2 0.500 s a step (4.0 tiles)" in line
    assert "the median of 4 ranks is 0.105 s" in line
    scalars = found.take_scalars()
    assert scalars["ranks/compute_s_max"] == pytest.approx(0.5)
    assert found.take_scalars() == {}
    [line] = found.add(reports([0.1] * 4, [0.0, 0.3, 0.0, 0.0]))
    assert "slow in data wait: rank 1 on node1" in line


def test_what_is_small_beside_a_step_is_not_slow(monkeypatch):
    found = straggler(monkeypatch, 2, seconds_per_step=10.0)
    assert found.add(reports([0.001, 0.1], [0.0, 0.01])) == []
