"""What is run again, and what is not."""

from __future__ import annotations

import json
import os
import signal
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


def script(tmp_path, name: str, code: str) -> Stage:
    return Stage(name, tmp_path / f"output-{name}", [sys.executable, "-c", code])


@pytest.mark.parametrize("first_fails", [True, False])
def test_a_stage_beside_one_that_fails_is_stopped_and_run_again(tmp_path, first_fails):
    ready = tmp_path / "ready"
    lasting = script(tmp_path, "lasting", f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(60)")
    failing = script(
        tmp_path, "failing",
        f"import pathlib, time\nwhile not pathlib.Path({str(ready)!r}).exists(): time.sleep(0.01)\nraise SystemExit(3)",
    )  # fmt: skip
    pair = [failing, lasting] if first_fails else [lasting, failing]
    chain = Chain(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        chain.run([replace(pair[0], beside=True), pair[1]])
    assert stopped.value.code == 3
    assert all(process.poll() is not None for process in chain._running)
    journal = json.loads((tmp_path / "stages.json").read_text())
    assert [journal[name]["done"] for name in ("lasting", "failing")] == [False, False]


@pytest.fixture
def handlers():
    """The signal handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_stop_that_comes_as_a_stage_ends_well_is_kept(tmp_path):
    deaf = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    ignoring = script(tmp_path, "ignoring", f"{deaf}; os.kill({os.getpid()}, signal.SIGINT); time.sleep(0.3)")
    with pytest.raises(SystemExit) as stopped:
        Chain(tmp_path).run([ignoring, mark(tmp_path, "b")])
    assert stopped.value.code == 75
    assert not (tmp_path / "log").exists()
    assert json.loads((tmp_path / "stages.json").read_text())["ignoring"]["done"]
