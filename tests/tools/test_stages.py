"""What is run again, and what is not."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from tools.stages import Chain, Stage


def mark(tmp_path, name: str, code: int = 0) -> Stage:
    """A stage that writes its name to a log, makes its folder, and refuses one that is there."""
    output = tmp_path / f"output-{name}"
    script = f"open({str(tmp_path / 'log')!r}, 'a').write({name!r}); import os; {code} or os.mkdir({str(output)!r}); "
    return Stage(name, output, [sys.executable, "-c", f"{script} raise SystemExit({code})"])


def test_a_failed_stage_is_run_again_and_those_before_it_are_not(tmp_path):
    first, second = mark(tmp_path, "a"), mark(tmp_path, "b")
    with pytest.raises(SystemExit) as stopped:
        Chain(tmp_path).run([first, mark(tmp_path, "b", code=3)])
    assert stopped.value.code == 3
    Chain(tmp_path).run([first, second])
    assert (tmp_path / "log").read_text() == "abb"


def test_a_changed_stage_takes_the_later_ones_with_it(tmp_path):
    Chain(tmp_path).run([mark(tmp_path, "a"), mark(tmp_path, "b")])
    before = mark(tmp_path, "a")
    changed = Stage("a", before.output, [*before.command, "changed"])
    Chain(tmp_path).run([changed, mark(tmp_path, "b")])
    assert (tmp_path / "log").read_text() == "abab"
    assert set(json.loads((tmp_path / "stages.json").read_text())) == {"a", "b"}


def test_a_changed_file_that_a_stage_reads_runs_it_again(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: 1")
    chain = [mark(tmp_path, "a"), replace(mark(tmp_path, "b"), reads=(recipe,)), mark(tmp_path, "c")]
    Chain(tmp_path).run(chain)
    Chain(tmp_path).run(chain)
    recipe.write_text("a: 2")
    Chain(tmp_path).run(chain)
    assert (tmp_path / "log").read_text() == "abcbc"
