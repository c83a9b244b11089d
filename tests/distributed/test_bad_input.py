"""Shards that are not as they should be, in a real run: said where and what, and nothing lost."""

from __future__ import annotations

import json
import shutil

from megablip.metrics.points import read_metrics
from tests.data.builders import write_tar
from tests.distributed import runs


def test_a_truncated_shard_is_listed_and_what_is_whole_is_trained(work):
    cut = work / "cut"
    shutil.copytree(work / "data", cut)
    shard = cut / "caption-1.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    for index in cut.glob("*.idx"):
        index.unlink()
    recipe = runs.make_recipe(work, run_dir=str(work / "cut-run"), duration="1 epochs")
    runs.train(recipe, f"data.sources.0.shards={cut}/caption-*.tar")
    [line] = [json.loads(line) for line in (work / "cut-run" / "quarantine.jsonl").read_text().splitlines()]
    assert line["shard"] == str(shard)
    assert "the file ends inside a member" in line["error"]
    [*_, last] = read_metrics(work / "cut-run")
    assert 100 < last["documents_seen"] < 120, "all but some of one shard's twenty"


def test_too_many_bad_samples_stop_all_ranks_with_the_list(work):
    rows = [{"__key__": b"%d" % n, "png": b"no image", "txt": b"red far"} for n in range(90)]
    write_tar(work / "bad" / "bad.tar", rows)
    run_dir = work / "bad-run"
    recipe = runs.make_recipe(work, run_dir=str(run_dir), duration="60 steps")
    shards = json.dumps([str(work / "data" / "caption-*.tar"), str(work / "bad" / "bad.tar")])
    done = runs.train(recipe, f"data.sources.0.shards={shards}", check=1)
    assert "bad samples, more than the 32 allowed" in done.stderr
    assert f"{work}/bad/bad.tar, key" in done.stderr
    assert "Traceback" not in done.stderr
    lines = (run_dir / "quarantine.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) > 32


def test_a_broken_image_is_skipped_and_listed(work):
    broken = work / "broken"
    rows = [{"__key__": b"bad-%d" % n, "png": b"\x89PNG no image", "txt": b"red far"} for n in range(2)]
    write_tar(broken / "caption-9.tar", rows)
    recipe = runs.make_recipe(work, run_dir=str(work / "broken-run"), duration="4 steps")
    shards = json.dumps([str(work / "data" / "caption-*.tar"), str(broken / "caption-9.tar")])
    runs.train(recipe, f"data.sources.0.shards={shards}", "data.packing_buffer=32")
    lines = [json.loads(line) for line in (work / "broken-run" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} <= {"bad-0", "bad-1"}
    assert lines
    assert all("caption-9.tar" in line["shard"] and line["error"] for line in lines)


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(work, small_disk):
    recipe = runs.make_recipe(work, run_dir=str(small_disk), duration="14 steps", checkpoint__every_steps=2)
    done = runs.train(recipe, check=1)
    kept = sorted(path.parent.name for path in small_disk.glob("checkpoints/*/COMMITTED"))
    assert kept, "the first checkpoint fits"
    assert (small_disk / "checkpoints" / "latest").read_text() == kept[-1]
    assert not list(small_disk.glob("checkpoints/*.tmp"))
    assert "training goes on" in done.stdout
    assert "free space" in done.stdout + done.stderr
    assert len(read_metrics(small_disk)) == 14
