"""The table of attempts."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from launcher.status import show_status
from megablip.errors import ConfigError


def shown(run_dir) -> list[str]:
    output = StringIO()
    show_status(run_dir, Console(file=output, width=150))
    return output.getvalue().splitlines()


def test_attempts_with_loss_and_speed_of_their_own_steps(tmp_path):
    attempts = [
        {"id": "1-ab", "started": "2026-11-27T10:00:00+0000", "ended": "2026-11-27T11:02:03+0000", "job": 7,
         "restarts": 0, "nodes": [f"n{n}" for n in range(9)], "ranks": 72, "first_step": 0, "last_step": 12,
         "outcome": "failed", "reason": "rank 3: ShardError: [bold]no[/] such shard\n  where: x.tar"},
        {"id": "2-cd", "started": "2026-11-27T11:03:00+0000", "job": 7, "restarts": 1, "nodes": ["n1", "n2"],
         "ranks": 16, "first_step": 10, "outcome": "running"},
        {"outcome": "failed"},
    ]  # fmt: skip
    (tmp_path / "status.json").write_text(json.dumps({"attempts": attempts}))
    points = [{"step": step, "loss": 5 - step / 10, "tokens_per_s": 1000 * step} for step in range(1, 16)]
    del points[4]["tokens_per_s"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    lines = shown(tmp_path)
    [first] = [line for line in lines if "1:02:03" in line]
    assert first.split() == [
        "1", "2026-11-27", "10:00:00", "1:02:03", "7", "n0,", "n1,", "n2", "and", "6", "more", "72", "0", "to", "12",
        "3.8000", "7,000", "failed",
    ]  # fmt: skip
    [second] = [line for line in lines if "restart 1" in line]
    assert second.split()[-6:] == ["10", "to", "15", "3.5000", "13,000", "running"]
    assert "attempt 1-ab, failed: rank 3: ShardError: [bold]no[/] such shard" in lines


def test_where_nothing_has_begun(tmp_path):
    with pytest.raises(ConfigError, match="no run has begun here"):
        shown(tmp_path)
