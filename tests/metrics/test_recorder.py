"""Which points are written, and what rates mean; the model and its loader are stand-ins."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megablip.config import parse_config
from megablip.engine.objective import TokenObjective
from megablip.engine.progress import Progress
from megablip.engine.symmetry import StepReport
from megablip.engine.topology import Topology
from megablip.metrics import recorder as module
from megablip.metrics import sums, timing
from megablip.metrics.points import read_metrics
from megablip.metrics.recorder import Recorder
from megablip.metrics.startup import StartClock
from tests.minimal import RECIPE
from tests.model.tiny import make_doc, pack, tiny_model


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sums.dist, "all_reduce", lambda tensor: None)
    return now


def make_recorder(tmp_path, **log) -> Recorder:
    raw = copy.deepcopy(RECIPE) | {"run_dir": str(tmp_path), "log": {"picture_every_steps": 0} | log}
    model = tiny_model()
    loader = SimpleNamespace(samples={"a": 50}, quarantine=SimpleNamespace(counts={}))
    return Recorder(
        parse_config(raw, "test"), model.config, Topology(0, 1, 0, torch.device("cpu")), SimpleNamespace(module=model),
        model.vision_tower, loader, Progress(), StartClock(), TokenObjective(),
    )  # fmt: skip


def run_step(recorder, clock, seconds=2.0, **parts) -> None:
    """A step over one document of source a, 10 text tokens and 3 tiles of 3 tokens, that takes so long."""
    batch = SimpleNamespace(
        samples_drawn=np.array([25, 7]), samples_dropped=0, micro_batches=[pack([make_doc(10, [(2, 1)], 0)])]
    )
    totals = recorder.begin(batch)
    for name, part in parts.items():
        with recorder.timer.part(name):
            clock[0] += part
    clock[0] += seconds - sum(parts.values())
    totals.reduce()
    recorder._progress.step += 1
    total = StepReport(step=0, micro_batches=1, tokens=19, documents=1, valid_labels=5)
    recorder.end(totals, total, {"grad_norm": 1.0})


def test_rates_are_means_since_the_last_point(tmp_path, clock):
    recorder = make_recorder(tmp_path, every_steps=3)
    run_step(recorder, clock)  # the first step is always a point
    run_step(recorder, clock, 1.0, forward=0.5)
    run_step(recorder, clock, 4.0, forward=1.5, data_wait=1.0)
    recorder.close()
    first, point = read_metrics(tmp_path)
    assert (first["step"], point["step"]) == (1, 3)
    assert point["tokens_per_s"] == pytest.approx(2 * 19 / 5)
    assert point["time/step_s"] == pytest.approx(2.5)
    assert point["time/forward_s"] == pytest.approx(1.0)
    assert point["time/data_wait_s"] == pytest.approx(0.5)
    assert point["time/other_s"] == pytest.approx(1.0)
    assert point["data_wait_share"] == pytest.approx(1 / 7)
    assert point["grad_norm"] == 1.0
    assert "mfu" not in point
    assert any(name.startswith("start/") for name in first)
    assert not any(name.startswith("start/") for name in point)


def test_what_a_step_holds(tmp_path, clock):
    recorder = make_recorder(tmp_path)
    run_step(recorder, clock)
    recorder.close()
    (point,) = read_metrics(tmp_path)
    assert point["data/padding_share"] == pytest.approx(1 - 19 / (4 * 128))
    assert point["data/documents_per_sequence"] == 1 / 4
    assert point["data/visual_token_share"] == pytest.approx(9 / 19)
    assert (point["data/tiles_per_rank_mean"], point["data/tiles_per_rank_max"]) == (3, 3)
    assert point["epochs_by_source/a"] == 25 / 50
    assert "epochs_by_source/b" not in point, "it is not counted"
    assert point["memory/host_rss_gib"] > 0.1


def test_mfu_is_the_share_of_a_known_peak(tmp_path, clock, monkeypatch):
    recorder = make_recorder(tmp_path)
    recorder._peak = 1e9
    run_step(recorder, clock, seconds=2.0)
    recorder.close()
    (point,) = read_metrics(tmp_path)
    flops = recorder._flops.of_step(tokens=19, labels=5, pairs=19 * 20 / 2, tiles=3, images=1)
    assert point["mfu"] == pytest.approx(flops / 2.0 / 1e9)
    assert point["tflops_per_s_per_rank"] == pytest.approx(flops / 2.0 / 1e12)


def test_held_out_data_takes_no_speed_away(tmp_path, clock, monkeypatch):
    def measure(self):
        clock[0] += 50
        return {"held_out_loss": 3.0}

    monkeypatch.setattr(module.HeldOut, "is_due", lambda self, step, finished: step == 2)
    monkeypatch.setattr(module.HeldOut, "measure", measure)
    recorder = make_recorder(tmp_path, every_steps=100)
    run_step(recorder, clock)
    run_step(recorder, clock, seconds=2.0)
    recorder.close()
    _, point = read_metrics(tmp_path)
    assert (point["step"], point["held_out_loss"]) == (2, 3.0)
    assert point["tokens_per_s"] == pytest.approx(19 / 2)
    assert point["time/held_out_s"] == pytest.approx(50)
    assert point["time/step_s"] == pytest.approx(52)


def test_other_ranks_write_nothing(tmp_path, clock):
    raw = copy.deepcopy(RECIPE) | {"run_dir": str(tmp_path)}
    model = tiny_model()
    recorder = Recorder(
        parse_config(raw, "test"), model.config, Topology(1, 2, 1, torch.device("cpu")), SimpleNamespace(module=model),
        model.vision_tower, SimpleNamespace(samples={}, quarantine=SimpleNamespace(counts={})), Progress(),
        StartClock(), TokenObjective(),
    )  # fmt: skip
    run_step(recorder, clock)
    recorder.close()
    assert list(tmp_path.iterdir()) == []
