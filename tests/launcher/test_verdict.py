"""What the reports of several nodes mean together."""

from __future__ import annotations

import json

import pytest

from launcher.preflight import MARK, PIECE, _about, read_reports
from launcher.verdict import NodeReport, blame, compare, judge, undecided
from megablip.doctor.finding import Finding

NAMES = ["n0", "n1", "n2", "n3"]
MASTER = ("10.0.0.1", 12345)


def pair(one: str, other: str) -> frozenset[str]:
    return frozenset((one, other))


def reports(
    count: int = 4, slow: dict[tuple[int, int], float] | None = None, failed=(), clocks=None
) -> list[NodeReport]:
    """Nodes that have met and are content with each other, but for what is given."""
    found = []
    for number in range(count):
        report = NodeReport(NAMES[number], members=list(range(count)), spoke=True, done=True)
        report.clock_s = (clocks or {}).get(number, 0.0)
        for other in range(count):
            if other != number:
                at = tuple(sorted((number, other)))
                error = "no route" if at in failed else ""
                speed = (slow or {}).get(at, 10.0)
                report.sums.append({"other": other, "device": "cpu", "gb_per_s": speed, "error": error})
        found.append(report)
    return found


def wrong(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.node, finding.subject) for finding in found if not finding.ok or finding.warns]


def test_nodes_that_agree_may_start():
    report = judge(reports(), MASTER)
    assert report.ok
    assert report.usable == NAMES
    assert wrong(report.findings) == []
    assert {"all-reduce", "clocks", "run directory", "meeting place"} == {f.subject for f in report.findings}


def test_a_node_that_fails_with_all_others_is_blamed():
    found = judge(reports(failed={(0, 2), (1, 2), (2, 3)}), MASTER)
    assert wrong(found.findings) == [("n2", "all-reduce")]
    assert found.usable == ["n0", "n1", "n3"]
    assert "no route" in found.bad["n2"]


def test_of_one_pair_that_fails_no_node_is_blamed_and_nothing_starts():
    found = judge(reports(failed={(1, 2)}), MASTER)
    assert wrong(found.findings) == [("", "all-reduce")]
    assert "between n1 and n2: cpu: no route" in found.findings[-2].found + found.findings[-1].found + str(
        found.findings
    )
    assert not found.ok
    assert found.usable == []


def test_a_slow_node_is_named_and_may_start():
    found = judge(reports(slow={(0, 3): 2.0, (1, 3): 2.1, (2, 3): 2.2}), MASTER)
    assert wrong(found.findings) == [("n3", "all-reduce")]
    [slow] = [finding for finding in found.findings if finding.warns]
    assert slow.found == "2.10 GB/s with 3 others, 10.00 elsewhere"
    assert found.usable == NAMES


def test_of_three_nodes_too_the_slow_one_is_named():
    assert wrong(judge(reports(3, slow={(0, 2): 2.0, (1, 2): 2.0}), MASTER).findings) == [("n2", "all-reduce")]


def test_sums_over_a_fast_fabric_that_are_as_slow_as_tcp_are_told():
    nodes = reports(2, slow={(0, 1): 3.0})
    for report in nodes:
        report.findings.append(Finding("fabric", "8 x InfiniBand 400 Gb/sec (4X NDR)").on(report.node))
        report.sums[0]["device"] = "cuda:0"
    [slow] = [finding for finding in compare(nodes, MASTER) if finding.warns]
    assert "a port carries 50 GB/s" in slow.means


def test_a_clock_that_is_off_is_told():
    found = judge(reports(clocks={2: -61.5}), MASTER)
    [clock] = [finding for finding in found.findings if finding.warns]
    assert (clock.node, clock.found) == ("n2", "61.5 s behind")
    assert found.ok


def test_a_node_with_a_folder_of_its_own_is_blamed():
    nodes = reports()
    nodes[1].unseen = [0, 2, 3]
    for number in (0, 2, 3):
        nodes[number].unseen = [1]
    found = judge(nodes, MASTER)
    assert wrong(found.findings) == [("n1", "run directory")]
    assert found.usable == ["n0", "n2", "n3"]


def test_of_two_nodes_with_folders_of_their_own_both_are_named():
    nodes = reports(2)
    nodes[0].unseen, nodes[1].unseen = [1], [0]
    found = judge(nodes, MASTER)
    assert wrong(found.findings) == [("", "run directory")]
    assert found.usable == []


def test_a_node_that_can_not_write_is_blamed_once():
    nodes = reports(2)
    nodes[1].findings.append(Finding("run directory", "Read-only file system", ok=False).on("n1"))
    nodes[0].unseen = nodes[1].unseen = [1]
    found = judge(nodes, MASTER)
    assert wrong(found.findings) == [("n1", "run directory")]
    assert found.usable == ["n0"]


def test_a_node_that_says_nothing_is_named_with_sruns_words():
    nodes = reports(2)
    nodes[1] = NodeReport("n1", message="execve(): /no/python: No such file or directory")
    found = judge(nodes, MASTER)
    assert list(found.bad) == ["n1"]
    assert "/no/python" in found.bad["n1"]


def test_a_node_that_ends_early_is_named_with_its_last_check():
    nodes = reports(2)
    nodes[1].done, nodes[1].findings, nodes[1].message = False, [Finding("driver", "570.1").on("n1")], "killed"
    found = judge(nodes, MASTER)
    assert "after 'driver': killed" in found.bad["n1"]


def cut_off(numbers: list[int]) -> list[NodeReport]:
    nodes = reports()
    for number in numbers:
        nodes[number].no_meeting, nodes[number].clock_s, nodes[number].sums = "timed out", None, []
    return nodes


@pytest.mark.parametrize(("numbers", "blamed"), [([2], ["n2"]), ([1, 2, 3], ["n0"])])
def test_who_can_not_be_reached_is_blamed(numbers, blamed):
    found = judge(cut_off(numbers), MASTER)
    assert list(found.bad) == blamed


def test_a_port_that_is_taken_is_the_first_nodes():
    nodes = cut_off([1, 2, 3])
    nodes[0].no_meeting = "port 12345 is taken by another program"
    found = judge(nodes, MASTER)
    assert list(found.bad) == ["n0"]
    assert any("ss -ltnp 'sport = :12345'" in finding.remedy for finding in found.findings)


@pytest.mark.parametrize(
    ("subject", "values", "blamed", "may_start"),
    [
        ("torch", ["2.13.0", "2.13.0", "2.12.0", "2.13.0"], "n2", False),
        ("torch", ["2.13.0", "2.13.0", "2.12.0", "2.12.0"], "", False),
        ("code", ["a", "a", "a", "b"], "n3", False),
        ("shards of ocr", ["3 shards", "2 shards", "3 shards", "3 shards"], "n1", False),
        ("model", ["53 tensors", "53 tensors", "53 tensors", "9 tensors"], "n3", False),
        ("driver", ["570.1", "570.1", "560.9", "570.1"], "n2", True),
        ("fabric", ["8 x IB", "7 x IB", "8 x IB", "8 x IB"], "n1", True),
    ],
)
def test_nodes_that_differ_are_named(subject, values, blamed, may_start):
    nodes = reports()
    for report, value in zip(nodes, values, strict=True):
        report.findings.append(Finding(subject, value).on(report.node))
    found = judge(nodes, MASTER)
    assert wrong(found.findings) == [(blamed, subject)]
    assert found.ok == may_start


def test_what_is_wrong_on_a_node_is_said_once():
    nodes = reports()
    for report in nodes:
        bad = report.node == "n2"
        report.findings.append(Finding("shards of a", "cut short" if bad else "3 shards", ok=not bad).on(report.node))
    assert wrong(judge(nodes, MASTER).findings) == [("n2", "shards of a")]


def test_what_is_wrong_everywhere_leaves_no_node():
    nodes = reports(2)
    for report in nodes:
        report.findings.append(Finding("shards of a", "the shard does not exist", ok=False).on(report.node))
    assert judge(nodes, MASTER).usable == []


def test_what_is_wrong_for_all_is_nobodys():
    nodes = reports(2)
    nodes[0].take({"common": vars(Finding("batch", "too few lanes", ok=False))})
    found = judge(nodes, MASTER)
    assert (found.ok, found.usable, found.bad) == (False, [], {})


def test_the_table_has_one_line_for_what_is_the_same(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    nodes = reports()
    for report in nodes:
        for finding in (Finding("torch", "2.13.0"), Finding("numpy", "2.4"), Finding("device", "no [GPU]")):
            report.findings.append(finding.on(report.node))
    judge(nodes, MASTER).print()
    out = capsys.readouterr().out
    assert "torch 2.13.0, numpy 2.4" in out
    assert out.count("no [GPU]") == 1
    assert "all 4" in out


def test_blame():
    star = {pair("a", "b"), pair("a", "c"), pair("d", "e")}
    assert blame(star, ["a", "b", "c", "d", "e"]) == {"a": 2}
    assert undecided(star, ["a", "b", "c", "d", "e"]) == [pair("d", "e")]


def line(node: int, record: int, place: int, count: int, text: str) -> str:
    return f"{MARK} {node} {record} {place}/{count} {text}\n"


def test_records_are_put_together_from_what_several_nodes_print():
    text = json.dumps({"finding": vars(Finding("model", "x" * PIECE))})
    half = len(text) // 2
    out = (
        "some library's banner\n"
        + line(0, 0, 0, 2, text[:half]) + line(1, 0, 0, 1, json.dumps({"done": True})) + line(0, 0, 1, 2, text[half:])
        + line(0, 1, 0, 1, '{"do') + line(7, 0, 0, 1, "{}")
    )  # fmt: skip
    first, second = read_reports(out, ["n0", "n1"])
    assert [finding.found for finding in first.findings] == ["x" * PIECE]
    assert (first.spoke, first.done, second.done) == (True, False, True)


def test_of_sruns_messages_those_about_the_node_are_taken():
    messages = (
        "slurmstepd: error: execve(): /no/python: No such file or directory\n"
        "srun: error: n1: task 1: Exited with exit code 2\nsrun: error: n12: task 3: Killed\n"
    )
    assert _about("n1", messages) == (
        "srun: error: n1: task 1: Exited with exit code 2; "
        "slurmstepd: error: execve(): /no/python: No such file or directory"
    )
    assert _about("n5", "") == "srun says nothing"
