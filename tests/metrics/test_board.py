"""metrics.jsonl, TensorBoard, and the progress line."""

from __future__ import annotations

import io
import json
import math
import os
from contextlib import suppress

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from megablip.metrics import board as module
from megablip.metrics.board import Board, ProgressLine
from megablip.metrics.points import read_metrics


def curve(run_dir, name="loss"):
    """(step, value) as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def points(run_dir):
    return [(point["step"], point["loss"]) for point in read_metrics(run_dir)]


def write(run_dir, start_step, steps):
    board = Board(run_dir, start_step, "seed: 1")
    for step, loss in steps:
        board.write(step, {"loss": loss})
    board.close()


def test_points_are_written_in_both_places(tmp_path):
    assert read_metrics(tmp_path) == []
    write(tmp_path, 0, [(1, 4.0), (2, 3.0)])
    assert points(tmp_path) == curve(tmp_path) == [(1, 4.0), (2, 3.0)]


def test_points_that_a_full_disk_refuses_are_written_later(tmp_path, capsys):
    board = Board(tmp_path, 0, "seed: 1")
    stream, calls = board._stream, []

    class Full:
        close = stream.close

        def write(self, data):
            calls.append(data)
            if len(calls) == 1:
                return stream.write(data[:7])  # the rest of the page
            if len(calls) < 4:
                raise OSError(28, "No space left on device")
            return stream.write(data)

    board._stream = Full()
    for step in (1, 2, 3):
        board.write(step, {"loss": float(step)})
    board.close()
    assert points(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert capsys.readouterr().err.count("No space left") == 1


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path):
    write(tmp_path, 0, [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)])
    write(tmp_path, 2, [(3, 2.5)])
    assert points(tmp_path) == curve(tmp_path) == [(1, 4.0), (2, 3.0), (3, 2.5)]


def test_a_point_is_on_disk_as_soon_as_it_is_written(tmp_path):
    board = Board(tmp_path, 0, "")
    board.write(1, {"loss": 4.0})
    assert points(tmp_path) == [(1, 4.0)]
    board.close()


@pytest.mark.parametrize("rest", ['{"step": 2, "lo', "\0\0\0\0", "7", "[1]", '{"loss": 1.0}', "\udcff"])
def test_a_last_line_that_is_damaged_is_left_out(tmp_path, rest):
    write(tmp_path, 0, [(1, 4.0)])
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(rest.encode(errors="surrogateescape"))
    assert points(tmp_path) == [(1, 4.0)]
    write(tmp_path, 1, [(2, 3.0)])
    assert points(tmp_path) == [(1, 4.0), (2, 3.0)]


def test_a_loss_that_is_no_number_is_kept(tmp_path):
    write(tmp_path, 0, [(1, math.nan), (2, math.inf)])
    (_, first), (_, second) = points(tmp_path)
    assert math.isnan(first)
    assert second == math.inf


def test_a_full_disk_on_resume_does_not_cost_the_curve(tmp_path, monkeypatch):
    write(tmp_path, 0, [(1, 4.0), (2, 3.0)])

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        Board(tmp_path, 2, "")
    assert points(tmp_path) == [(1, 4.0), (2, 3.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_is_reported_once_and_training_goes_on(small_disk, capsys):
    board = Board(small_disk, 0, "")
    board.write(1, {"loss": 4.0})
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))
    for step in range(2, 500):
        board.write(step, {"loss": 4.0, "x" * 100: 1.0})
    assert capsys.readouterr().err.count("metrics can't be written") == 1
    os.unlink(filler)
    board.write(500, {"loss": 1.0})
    board.close()
    steps = [step for step, _ in points(small_disk)]
    assert (steps[0], steps[-1]) == (1, 500)
    assert steps == sorted(set(steps))


def test_the_progress_line(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    line = ProgressLine()
    line.show(10, 0.1, {"loss": "4.0"})
    clock[0] += 5
    line.show(20, 0.2, {"loss": "3.0"})  # too early for another line in a log file
    clock[0] += 15
    line.show(30, 0.3, {"loss": "2.0"})
    line.show(100, 1.0, {"loss": "1.0"})  # the last is always shown
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "step 10 |  10% | loss 4.0 | ..."
    assert second == "step 30 |  30% | loss 2.0 | 70 s left"
    assert last == "step 100 | 100% | loss 1.0 | 0 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (125, "2 min"), (3599, "1 h 0 min"), (12000, "3 h 20 min")]
)
def test_the_time_left_is_easy_to_read(seconds, text):
    assert module._span(seconds) == text


def test_the_layout_leaves_out_what_stays_empty(tmp_path):
    layouts = []
    for number, unused in enumerate([(), ("MFU",)]):
        Board(tmp_path / str(number), 0, "", unused).close()
        events = EventAccumulator(str(tmp_path / str(number) / "tensorboard")).Reload()
        layouts.append(Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]))
    whole, less = ([chart.title for category in layout.category for chart in category.chart] for layout in layouts)
    assert layouts[0].category[0].title == "1. Is it learning?"
    assert [title for title in whole if title not in less] == ["MFU"]


def test_a_picture_is_shown_at_its_step(tmp_path):
    board = Board(tmp_path, 0, "")
    board.show("example", Image.new("RGB", (30, 20), (255, 0, 0)), 7)
    board.close()
    (image,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("example")
    assert (image.step, image.width, image.height) == (7, 30, 20)
    assert Image.open(io.BytesIO(image.encoded_image_string)).getpixel((5, 5)) == (255, 0, 0)


def test_every_line_is_json(tmp_path):
    write(tmp_path, 0, [(1, 4.0)])
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 4.0}
    ]
