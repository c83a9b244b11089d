import json
import os

import pytest

from megablip.data.quarantine import Quarantine
from megablip.errors import SampleError
from megablip.records import Skip


def skips(count, source="web", first=0):
    return tuple(
        Skip(source, "part-0.tar", f"k{n}", 512 * n, "no image\n  where: there") for n in range(first, first + count)
    )


def test_a_line_says_what_was_skipped_and_where(tmp_path):
    quarantine = Quarantine(tmp_path / "run/quarantine.jsonl", is_first=True)
    quarantine.add(3, skips(2))
    quarantine.add(4, ())
    quarantine.add(5, skips(1, first=7))
    lines = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert [(line["step"], line["key"], line["offset"]) for line in lines] == [
        (3, "k0", 0), (3, "k1", 512), (5, "k7", 3584)
    ]  # fmt: skip
    assert lines[0] == {
        "step": 3, "source": "web", "shard": "part-0.tar", "key": "k0", "offset": 0, "error": "no image\n  where: there"
    }  # fmt: skip


def test_a_sample_counts_once_over_epochs_ranks_and_resumes(tmp_path):
    path = tmp_path / "q.jsonl"
    first = Quarantine(path, is_first=True)
    first.add(1, skips(3))
    first.add(2, skips(3))
    first.add(2, skips(2, source="other"))
    assert first.counts == {"web": 3, "other": 2}
    with open(path, "a") as file:
        file.write('{"step": 3, "source": "we')  # a disk that was full
    resumed = [Quarantine(path, is_first=rank == 0) for rank in range(2)]
    resumed[1].add(2, skips(4))
    assert resumed[0].counts == {"web": 3, "other": 2}
    assert resumed[1].counts == {"web": 1}


@pytest.mark.parametrize(
    ("total", "drawn", "allowed"),
    # A source that is not counted has no total: what was drawn so far stands for its size.
    [(100, 10**6, 32), (50_000, 100, 50), (None, 100, 32), (None, 50_000, 50)],
)
def test_too_many_of_a_source_stop_the_run(tmp_path, total, drawn, allowed):
    quarantine = Quarantine(tmp_path / "q.jsonl", is_first=True)
    quarantine.add(1, skips(3))
    totals = {} if total is None else {"web": total}
    samples = {"web": drawn, "other": 0}, totals
    quarantine.check({"web": allowed, "other": 32}, *samples)
    with pytest.raises(SampleError, match=f"{allowed + 1} bad samples, more than the {allowed} allowed") as caught:
        quarantine.check({"web": allowed + 1, "other": 32}, *samples)
    assert caught.value.where == "source web"
    assert str(tmp_path / "q.jsonl") in caught.value.remedy
    assert "part-0.tar, key k2: no image" in caught.value.what


def test_a_disk_that_is_full_does_not_stop_the_run(tmp_path, capsys):
    os.mkdir(tmp_path / "q.jsonl")  # stands for any error of the file system
    quarantine = Quarantine(tmp_path / "q.jsonl", is_first=True)
    quarantine.add(1, skips(1))
    assert '"key": "k0"' in capsys.readouterr().err
    assert quarantine.counts == {"web": 1}
