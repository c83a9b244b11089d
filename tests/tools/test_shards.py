import os
import re
import tarfile

import pytest
import webdataset
from typer.testing import CliRunner

from megablip.data.index import index_path, load_index, open_shard
from megablip.data.shards import ShardSource
from tests.data.builders import add_member, raw_member, write_tar
from tools import shards
from tools.shard_writer import IndexedShardWriter
from tools.shards import app

END = bytes(1024)
SAMPLES = [{"jpg": b"j" * 700, "json": b"{}"}] * 12


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lint(*arguments):
    """(exit code, the lines of findings)."""
    result = run("lint", *arguments, "--jobs", "1")
    return result.exit_code, [line for line in result.stdout.splitlines() if "to do: " in line]


@pytest.fixture
def shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", SAMPLES)
    assert run("index", path).exit_code == 0
    return path


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def offset_of(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


# --- writing ------------------------------------------------------------------


def test_the_writer_gives_each_shard_its_index(tmp_path):
    with IndexedShardWriter(str(tmp_path / "a-%03d.tar"), samples_per_shard=4) as writer:
        for number in range(10):
            writer.write({"__key__": f"{number:03d}", "txt": "text", "json": {"n": number}})
    paths = sorted(map(str, tmp_path.glob("*.tar")))
    assert [os.path.basename(path) for path in paths] == ["a-000.tar", "a-001.tar", "a-002.tar"]
    for path, count in zip(paths, (4, 4, 2), strict=True):
        with open_shard(path) as file:
            assert len(load_index(path, file)) == count
    read = webdataset.WebDataset(paths, shardshuffle=False).decode()
    assert [sample["json"]["n"] for sample in read] == list(range(10))
    assert lint(tmp_path)[0] == 0


def test_a_shard_written_anew_gets_a_new_index(tmp_path):
    for count in (3, 5):
        with IndexedShardWriter(str(tmp_path / "a-%03d.tar"), samples_per_shard=10) as writer:
            for number in range(count):
                writer.write({"__key__": f"{number:03d}", "txt": b"x"})
        assert ShardSource("test", [str(tmp_path / "a-000.tar")]).total == count


# --- index --------------------------------------------------------------------


def test_index(tmp_path):
    paths = [write_tar(tmp_path / f"{n}.tar", SAMPLES[: n + 1]) for n in range(3)]
    result = run("index", tmp_path / "0.tar", tmp_path / "{1..2}.tar", "--jobs", "2")
    assert (result.exit_code, result.stdout.lstrip()) == (0, "3 shards, 6 samples\n")
    assert all(os.path.exists(index_path(str(path))) for path in paths)


def test_index_says_what_lint_would_tell(tmp_path, shard):
    break_a_header(shard)
    write_tar(tmp_path / "b.tar", [{"__key__": b"a b", "txt": b"x"}])
    remove_index(shard)
    for _ in range(2):  # walked, then by the index
        result = run("index", tmp_path, "--jobs", "1")
        lines = "2 shards, 12 samples, 1 damaged: run lint, 1 without an index: it can't be written, or a name holds"
        assert (result.exit_code, result.stdout.strip()) == (0, f"{lines} white space")


@pytest.mark.parametrize(
    ("spec", "message"),
    [("{tmp}/none.tar", "does not exist"), ("{tmp}/bad.tar", "zero bytes"), ("s3://bucket/a.tar", "beside a URL")],
)
def test_index_says_what_it_can_not_do(tmp_path, spec, message):
    (tmp_path / "bad.tar").write_bytes(b"")
    result = run("index", spec.format(tmp=tmp_path))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "to do: " in result.stderr


# --- lint ---------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_good_shards_have_no_findings(tmp_path, shard, jobs):
    other = write_tar(tmp_path / "b.tar", SAMPLES)
    run("index", other)
    result = run("lint", tmp_path, "--jobs", jobs)
    assert result.exit_code == 0
    assert "to do" not in result.stdout
    assert re.search(r"2 +│ 24 +│ [\d,]+ +│ 0 +│ \.jpg 24, \.json 24", result.stdout)


def remove_index(shard):
    shard.with_suffix(".idx").unlink()


def other_format(shard):
    shard.with_suffix(".idx").write_bytes(b"MMIDIDX")


def grow(shard):
    write_tar(shard, SAMPLES * 2)


def change_a_mode(shard):
    data = shard.read_bytes()
    offset = offset_of(shard, "000004.jpg")
    changed = data[offset : offset + 512].replace(b"0000644", b"0000446")
    shard.write_bytes(data[:offset] + changed + data[offset + 512 :])


def lose_a_line(shard):
    path = shard.with_suffix(".idx")
    _, first, _, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join(["v1.2 11\n", first, *rest]))


def break_a_header(shard):
    flip(shard, offset_of(shard, "000004.json") + 3)
    remove_index(shard)  # its size and its ends are what they were
    run("index", shard)


def cut_the_end(shard):
    os.truncate(shard, offset_of(shard, "000011.json") + 1024)
    run("index", shard)


def cut_a_member(shard):
    os.truncate(shard, offset_of(shard, "000011.jpg") + 900)
    run("index", shard)


def many_zeros(shard):
    os.truncate(shard, shard.stat().st_size + 20_000)
    run("index", shard)


def lack_members(shard):
    write_tar(shard, [*SAMPLES * 9, *[{"jpg": b"j"}] * 5])
    run("index", shard)


def large_member(shard):
    write_tar(shard, [*SAMPLES, {"jpg": bytes(2000), "json": b"{}"}])
    run("index", shard)


def large_sample(shard):
    write_tar(shard, [*SAMPLES, {"jpg": bytes(1400), "json": bytes(1200)}])
    run("index", shard)


CASES = [
    (remove_index, ["it has no index"]),
    (other_format, ["is no index"]),
    (grow, ["the index is stale"]),
    (change_a_mode, ["headers changed since"]),
    (lose_a_line, ["has 11 samples of 12"]),
    (break_a_header, [r"offset \d+: bytes \d+ to \d+ are damaged: no valid header; 1 samples beside it dropped"]),
    (cut_the_end, ["the end-of-archive block is missing"]),
    (cut_a_member, ["are damaged: the file ends inside a member; 1 samples"]),
    (many_zeros, ["bytes of zeros at the end"]),
    (lack_members, [r"key '0001\d\d' lacks \.json, which others have"] * 3 + ["2 more keys lack members"]),
    (large_member, [r"'000012\.jpg' has 2000 bytes, above the limit of 1500"]),
    (large_sample, [r"key '000012' has 2600 bytes, above the limit of 2500"]),
]


@pytest.mark.parametrize(("change", "findings"), CASES, ids=[change.__name__ for change, _ in CASES])
def test_each_fault_is_found(shard, monkeypatch, change, findings):
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 1500)
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", 2500)
    change(shard)
    code, lines = lint(shard)
    assert code == 1
    assert len(lines) == len(findings)
    for line, finding in zip(lines, findings, strict=True):
        assert line.startswith(str(shard))
        assert re.search(finding, line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "zero bytes"),
        (b"\x1f\x8b\x08 rest", "compressed"),
        (
            raw_member(b"a.txt", b"") + raw_member(b"b.txt", b"") + raw_member(b"a.jpg", b"") + END,
            "'a' are not adjacent",
        ),
        (raw_member(b"a.txt", b"") + raw_member(b"a.txt", b""), "two members of one extension"),
        (raw_member(b"README", b""), "no sample"),
    ],
)
def test_what_can_not_be_read_is_a_finding_and_the_others_are_still_walked(tmp_path, shard, content, message):
    (tmp_path / "b.tar").write_bytes(content)
    remove_index(shard)
    code, (of_a, of_b, *_) = lint(tmp_path)
    assert code == 1
    assert "no index" in of_a
    assert message in of_b


def test_keys_that_clash_hide_no_other_fault(shard):
    write_tar(shard, [*SAMPLES, {"__key__": b"000007", **SAMPLES[0]}])
    os.truncate(shard, 13 * 2560)
    code, lines = lint(shard)
    assert code == 1
    assert ["duplicate key '000007'" in lines[0], "end-of-archive" in lines[1]] == [True, True]


def test_names_that_no_terminal_should_get_are_escaped(tmp_path):
    """Those of findings, and those in the table."""
    samples = [raw_member(b"%d.%s" % (n, extension), b"x") for n in range(20) for extension in (b"a\xff", b"[b]\n\x1b")]
    (tmp_path / "a.tar").write_bytes(b"".join([*samples, raw_member(b"\xff\x1b\n.a\xff", b"x")]) + END)
    result = run("lint", tmp_path, "--jobs", "1")
    assert result.exit_code == 1
    assert r"key '\udcff\x1b\n' lacks .[b]\n\x1b, which others have" in result.stdout
    assert r".a\udcff 21, .[b]\n\x1b 20" in result.stdout
    assert "\x1b" not in result.stdout


def test_remote_shards_are_walked(shard):
    url = f"file://{shard}"
    assert lint(url) == (0, [])
    with tarfile.open(shard, "a") as tar:
        add_member(tar, "later.txt")
    code, lines = lint(url)
    assert code == 1
    assert lines[0].startswith(url)
    assert lint("file:///nowhere/a.tar")[0] == 1


def test_lint_changes_nothing(tmp_path, shard):
    remove_index(shard)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    lint(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
