"""What nodes find out together; each node is a thread here, with a store and groups of its own."""

from __future__ import annotations

import os
import socket
import threading
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import between_nodes
from launcher.between_nodes import Meeting, NoMeeting, Together, look_together, meet, turns


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Small sums, and waits that a test can afford."""
    monkeypatch.setattr(between_nodes, "VALUES", {"cpu": 5000})
    monkeypatch.setattr(between_nodes, "SEEN_S", 0.5)
    monkeypatch.setattr(between_nodes, "PAIR_S", 2.0)
    monkeypatch.setattr(between_nodes, "WAIT_S", 30.0)
    monkeypatch.setattr(between_nodes, "ARRIVE_S", 3.0)
    monkeypatch.setattr(between_nodes, "devices", lambda: ["cpu"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(folders: list[Path | None], act=look_together) -> dict[int, dict[str, Any]]:
    """What each node tells; a node without a folder does not come."""
    port, told = free_port(), defaultdict(lambda: defaultdict(list))

    def run(number: int, folder: Path) -> None:
        def say(record: dict[str, Any]) -> None:
            [(kind, value)] = record.items()
            told[number][kind].append(value)

        try:
            act(Meeting("127.0.0.1", port, number, len(folders), f"n{number}", "nonce"), folder, say)
        except NoMeeting as error:
            told[number]["no_meeting"].append(str(error))

    threads = [threading.Thread(target=run, args=(number, folder)) for number, folder in enumerate(folders) if folder]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return told


def test_three_nodes_agree(tmp_path):
    told = together([tmp_path] * 3)
    for number in range(3):
        assert told[number]["members"] == [[0, 1, 2]]
        assert told[number]["unseen"] == [[]]
        assert abs(told[number]["clock_s"][0]) < 1
        sums = told[number]["sum"]
        assert sorted(result["other"] for result in sums) == [n for n in range(3) if n != number]
        assert all(result["error"] == "" and result["gb_per_s"] > 0 for result in sums)
    assert not list(tmp_path.iterdir())


def test_a_node_with_a_folder_of_its_own_is_seen_by_nobody(tmp_path):
    folders = [tmp_path / name for name in ("shared", "own", "shared")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    told = together(folders)
    assert [told[number]["unseen"] for number in range(3)] == [[[1]], [[0, 2]], [[1]]]


def test_a_file_of_an_earlier_check_is_not_taken_for_this_ones(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / ".seen.nonce.0").write_text("other 0")
    assert together([tmp_path, own])[1]["unseen"] == [[0]]


def test_the_others_go_on_without_a_node_that_does_not_come(tmp_path):
    told = together([tmp_path, None, tmp_path])
    assert told[0]["members"] == told[2]["members"] == [[0, 2]]
    assert [result["error"] for result in told[2]["sum"]] == [""]


def test_who_comes_late_is_told(tmp_path):
    told_late = threading.Event()

    def act(meeting, folder, say):
        if meeting.number == 1:
            store = meet(meeting)
            store.wait(["members"], timedelta(seconds=20))
            try:
                Together(meeting, store)
            finally:
                told_late.set()
        else:
            store = meet(meeting)  # it lives as long as this variable
            say({"members": Together(meeting, store).members})
            told_late.wait(20)

    told = together([tmp_path, tmp_path], act)
    assert told[0]["members"] == [[0]]
    assert "took longer than 3 s" in told[1]["no_meeting"][0]


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NoMeeting, match=f"port {port} is taken"):
            meet(Meeting("127.0.0.1", port, 0, 2, "n0", "nonce"))


def test_a_first_node_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(between_nodes, "ARRIVE_S", 1.0)
    with pytest.raises(NoMeeting):
        meet(Meeting("127.0.0.1", free_port(), 1, 2, "n1", "nonce"))


def test_another_jobs_store_is_not_taken_for_ones_own(monkeypatch):
    monkeypatch.setattr(between_nodes, "ARRIVE_S", 1.0)
    port = free_port()
    other = meet(Meeting("127.0.0.1", port, 0, 1, "m0", "another"))
    other.set("members", "[0, 1, 2, 3]")
    meeting = Meeting("127.0.0.1", port, 1, 2, "n1", "nonce")
    monkeypatch.setattr(Together, "_get", lambda self, key, limit_s: self._store.wait([key], timedelta(seconds=0.5)))
    with pytest.raises(NoMeeting, match="the first node stopped answering"):
        Together(meeting, meet(meeting))


def test_a_wrong_sum_is_found(tmp_path, monkeypatch):
    real = between_nodes._group

    class Wrong:
        """Adds one to one value."""

        def __init__(self, *arguments):
            self.group = real(*arguments)

        def allreduce(self, tensors: list[torch.Tensor]):
            work = self.group.allreduce(tensors)
            work.wait()
            tensors[0][17] += 1
            return work

        def shutdown(self) -> None:
            self.group.shutdown()

    monkeypatch.setattr(between_nodes, "_group", Wrong)
    told = together([tmp_path] * 2)
    assert [result["error"] for result in told[0]["sum"]] == ["1 of 5000 sums are wrong"]


def test_a_node_that_fails_with_two_others_gives_up_and_the_rest_go_on(tmp_path, monkeypatch):
    real = between_nodes._group

    def broken(store, side, device):
        if threading.current_thread().name == "broken":
            raise RuntimeError("no route to host\nand more")
        return real(store, side, device)

    def act(meeting, folder, say):
        if meeting.number == 1:
            threading.current_thread().name = "broken"
        look_together(meeting, folder, say)

    monkeypatch.setattr(between_nodes, "_group", broken)
    told = together([tmp_path] * 4, act)
    assert [result["error"] for result in told[1]["sum"]] == ["no route to host"] * 2
    good = {(n, r["other"]) for n in (0, 2, 3) for r in told[n]["sum"] if not r["error"]}
    assert good == {(a, b) for a in (0, 2, 3) for b in (0, 2, 3) if a != b}


def test_a_node_that_dies_before_its_sums_holds_the_others_up_once(tmp_path, monkeypatch):
    monkeypatch.setattr(between_nodes, "WAIT_S", 1.0)

    def act(meeting, folder, say):
        if meeting.number != 2:
            look_together(meeting, folder, say)
            return
        met = Together(meeting, meet(meeting))
        say({"clock_s": met.clock_s()})
        met.unseen(folder)

    told = together([tmp_path] * 4, act)
    errors = [result["error"] for number in (0, 1, 3) for result in told[number]["sum"] if result["other"] == 2]
    assert errors.count("no sign of life for 1 s") >= 1
    assert len(errors) == 3
    good = {(n, r["other"]) for n in (0, 1, 3) for r in told[n]["sum"] if not r["error"]}
    assert good == {(a, b) for a in (0, 1, 3) for b in (0, 1, 3) if a != b}


@pytest.mark.parametrize("count", range(1, 10))
def test_every_two_members_meet_once_and_at_the_same_time(count):
    members = [3 * number + 1 for number in range(count)]
    orders = {own: turns(members, own) for own in members}
    for own, others in orders.items():
        assert sorted([*others, own]) == members
    if count % 2 == 0:
        for turn in range(count - 1):
            assert all(orders[orders[own][turn]][turn] == own for own in members)


def test_every_gpu_of_two_nodes_has_its_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(between_nodes, "devices", lambda: ["cpu:0", "cpu:1", "cpu:2"])
    real = between_nodes._group
    monkeypatch.setattr(between_nodes, "_group", lambda store, side, device: real(store, side, "cpu"))
    told = together([tmp_path] * 2)
    assert [result["device"] for result in told[1]["sum"]] == ["cpu:0", "cpu:1", "cpu:2"]
    assert os.listdir(tmp_path) == []
