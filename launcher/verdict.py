"""What the reports of all nodes mean together, and which nodes are to blame."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from megablip.doctor.finding import Finding, show

CLOCKS_S = 2.0  # apart
SLOW = 0.5  # of what is usual
SLOW_PORT = 0.25  # of what one port of the fabric carries
HARDWARE = ("the slowest sets the pace", "ask for nodes of one kind (constraint in the profile)")
PROGRAMS = ("ranks would run different programs", "use one environment and one checkout for all")
FILES = ("ranks would train with other data or weights", "mount the same file system there, or leave the node out")


@dataclass
class NodeReport:
    """What one node has told. `sums` are the fields of between_nodes.Sum; other nodes are named by number."""

    node: str
    findings: list[Finding] = field(default_factory=list)
    members: list[int] | None = None
    clock_s: float | None = None
    unseen: list[int] = field(default_factory=list)
    sums: list[dict[str, Any]] = field(default_factory=list)
    no_meeting: str = ""
    spoke: bool = False
    done: bool = False
    message: str = ""
    """If it is not done: why, as far as can be told from outside."""

    def take(self, record: dict[str, Any]) -> None:
        """One printed record."""
        self.spoke = True
        [(kind, value)] = record.items()
        if kind == "finding":
            self.findings.append(Finding(**value).on(self.node))
        elif kind == "common":
            self.findings.append(Finding(**value))
        elif kind == "sum":
            self.sums.append(value)
        else:
            setattr(self, kind, value)

    def failed(self, subject: str) -> bool:
        return any(finding.subject == subject and not finding.ok for finding in self.findings)


@dataclass(frozen=True)
class Report:
    """What was found on all nodes and between them."""

    nodes: list[str]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether the job may start on all of these nodes."""
        return all(finding.ok for finding in self.findings)

    @property
    def bad(self) -> dict[str, str]:
        """Nodes that something is wrong with, and what."""
        reasons: dict[str, list[str]] = defaultdict(list)
        for finding in self.findings:
            if not finding.ok and finding.node:
                reasons[finding.node].append(f"{finding.subject}: {finding.found}")
        return {node: "; ".join(found) for node, found in reasons.items()}

    @property
    def reason(self) -> str:
        """All that is wrong, in one line."""
        wrong: dict[str, list[str]] = {}
        for finding in self.findings:
            if not finding.ok:
                wrong.setdefault(f"{finding.subject}: {finding.found}", []).append(finding.node)
        return "; ".join(f"{self._names(nodes)}: {what}".removeprefix(": ") for what, nodes in wrong.items())

    @property
    def usable(self) -> list[str]:
        """Nodes that the run could go on with; none if something is wrong that no single node is to blame for."""
        if any(not finding.ok and not finding.node for finding in self.findings):
            return []
        bad = self.bad
        return [node for node in self.nodes if node not in bad]

    def print(self) -> None:
        """The table; what is the same on several nodes is one line."""
        grouped: dict[Finding, list[str]] = {}
        for finding in self.findings:
            grouped.setdefault(replace(finding, node=""), []).append(finding.node)
        right = [finding for finding, nodes in grouped.items() if finding.ok and nodes == self.nodes]
        versions = [finding for finding in right if _is_version(finding)]
        lines = [finding.on(self._names(nodes)) for finding, nodes in grouped.items() if finding not in versions]
        if versions:
            found = ", ".join(f"{finding.subject} {finding.found}" for finding in versions)
            lines.insert(0, Finding("versions", found, node=self._names(self.nodes)))
        show(lines)

    def _names(self, nodes: list[str]) -> str:
        if len(nodes) == len(self.nodes) > 1:
            return f"all {len(nodes)}"
        return ", ".join(nodes)


def judge(reports: list[NodeReport], master: tuple[str, int]) -> Report:
    """All findings: those of the nodes, and what follows from their comparison.

    Args:
        reports: in the order of the nodes' numbers.
        master: address and port on the first node.
    """
    findings = [finding for report in reports for finding in report.findings]
    return Report([report.node for report in reports], [*findings, *compare(reports, master)])


def compare(reports: list[NodeReport], master: tuple[str, int]) -> list[Finding]:
    """What the nodes' reports say together: who is missing, who differs, who can't be reached, who is slow."""
    return [
        *_silent(reports),
        *_meeting(reports, master),
        *_differences(reports),
        *_clocks(reports),
        *_folders(reports),
        *_sums(reports),
    ]


def _silent(reports: list[NodeReport]) -> Iterable[Finding]:
    for report in reports:
        if not report.spoke:
            yield Finding(
                "start", f"no word from it: {report.message}", ok=False, node=report.node,
                means="nothing can be started there, or Python does not get as far as this program",
                remedy="see that the interpreter and the checkout are there at the same path (`python` in the profile)",
            )  # fmt: skip
        elif not report.done:
            last = report.findings[-1].subject if report.findings else "start"
            yield Finding(
                "checks", f"they ended early, after '{last}': {report.message}", ok=False, node=report.node,
                means="what comes next hangs or kills the process there", remedy="leave the node out; look at its log",
            )  # fmt: skip


def _meeting(reports: list[NodeReport], master: tuple[str, int]) -> Iterable[Finding]:
    first, *others = reports
    if first.no_meeting:
        yield Finding(
            "port", first.no_meeting, ok=False, node=first.node, means="ranks could not meet there",
            remedy=f"`ss -ltnp 'sport = :{master[1]}'` on {first.node} shows by which; end it, or leave the node out",
        )  # fmt: skip
        return
    cut_off = [report for report in others if report.no_meeting]
    if first.done and len(cut_off) > len(others) / 2 and len(others) > 1:
        yield Finding(
            "meeting place", f"{len(cut_off)} of {len(others)} nodes can't use it: {cut_off[0].no_meeting}", ok=False,
            node=first.node, means=f"it does not let others in at {master[0]}:{master[1]}",
            remedy="leave the node out; a firewall, or a network of its own",
        )  # fmt: skip
    else:
        for report in cut_off:
            yield Finding(
                "meeting place", report.no_meeting, ok=False, node=report.node,
                means=f"its ranks could not join the others at {master[0]}:{master[1]}",
                remedy="see which network joins the nodes (network_interface in the profile); or leave the node out",
            )  # fmt: skip
    if first.members and not cut_off:
        yield Finding("meeting place", f"{len(first.members)} of {len(reports)} nodes met at {master[0]}:{master[1]}")


def _differences(reports: list[NodeReport]) -> Iterable[Finding]:
    values: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    consequences: dict[str, tuple[str, str]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.ok and finding.node and _consequence(finding):
                values[finding.subject][finding.found].append(report.node)
                consequences[finding.subject] = _consequence(finding)
    for subject, by_value in values.items():
        ranked = sorted(by_value.items(), key=lambda item: -len(item[1]))
        if len(ranked) < 2:
            continue
        means, remedy = consequences[subject]
        only_told = means == HARDWARE[0]
        usual, usual_nodes = ranked[0]
        if len(ranked[1][1]) == len(usual_nodes):
            found = " and ".join(f"{value} on {_some(nodes)}" for value, nodes in ranked)
            yield Finding(subject, found, ok=only_told, warns=only_told, means=means, remedy=remedy)
            continue
        for value, nodes in ranked[1:]:
            for node in nodes:
                found = f"{value}, and {usual} on {len(usual_nodes)} others"
                yield Finding(subject, found, ok=only_told, warns=only_told, node=node, means=means, remedy=remedy)


def _clocks(reports: list[NodeReport]) -> Iterable[Finding]:
    clocks = {report.node: report.clock_s for report in reports if report.clock_s is not None}
    if len(clocks) < 2:
        return
    middle = statistics.median_low(clocks.values())
    far = {node: clock - middle for node, clock in clocks.items() if abs(clock - middle) > CLOCKS_S}
    for node, seconds in far.items():
        yield Finding(
            "clock", f"{abs(seconds):,.1f} s {'ahead' if seconds > 0 else 'behind'}", warns=True, node=node,
            means="times in logs and of files can't be compared; certificates may be refused",
            remedy="have its time service looked at: `timedatectl`",
        )  # fmt: skip
    if not far:
        yield Finding("clocks", f"{max(clocks.values()) - min(clocks.values()):.2f} s apart at most")


def _folders(reports: list[NodeReport]) -> Iterable[Finding]:
    names = [report.node for report in reports]
    met = [report for report in reports if report.clock_s is not None]
    edges = {frozenset((report.node, names[other])) for report in met for other in report.unseen}
    unwritable = {report.node for report in reports if report.failed("run directory")}
    for node, count in blame({edge for edge in edges if not edge & unwritable and len(edge) == 2}, names).items():
        yield Finding(
            "run directory", f"{count} other nodes don't see what it writes there, or it does not see theirs",
            ok=False, node=node, means="it is a folder of that node's own: checkpoints would lack its part",
            remedy="mount the shared file system there, leave the node out, or choose another run_dir",
        )  # fmt: skip
    for pair in undecided({edge for edge in edges if not edge & unwritable and len(edge) == 2}, names):
        yield Finding(
            "run directory", f"{' and '.join(sorted(pair))} don't see each other's files", ok=False,
            means="it is not one folder: a checkpoint would lack a part",
            remedy="choose a run_dir on a file system that all nodes share",
        )  # fmt: skip
    if len(met) > 1 and not edges:
        yield Finding("run directory", f"{len(met)} nodes see the same files")


def _sums(reports: list[NodeReport]) -> Iterable[Finding]:
    names = [report.node for report in reports]
    met = {number for number, report in enumerate(reports) if report.clock_s is not None}
    speeds: dict[frozenset[str], float] = {}
    errors: dict[frozenset[str], str] = {}
    heard: set[frozenset[str]] = set()
    for number in met:
        for result in reports[number].sums:
            pair = frozenset((names[number], names[result["other"]]))
            heard.add(pair)
            if result["error"]:
                if "given up" not in result["error"]:
                    errors.setdefault(pair, f"{result['device']}: {result['error']}")
            else:
                speeds[pair] = min(speeds.get(pair, float("inf")), result["gb_per_s"])
    for one in met:
        for other in met:
            pair = frozenset((names[one], names[other]))
            if one < other and pair not in heard and reports[one].done and reports[other].done:
                errors.setdefault(pair, "no result")
    means, remedy = "the run would hang or train on wrong numbers", "leave the node out, and have its network looked at"
    for node, count in blame(set(errors), names).items():
        reason = next(text for pair, text in errors.items() if node in pair)
        found = f"sums with {count} other nodes fail; {reason}"
        yield Finding("all-reduce", found, ok=False, node=node, means=means, remedy=remedy)
    for pair in undecided(set(errors), names):
        found = f"between {' and '.join(sorted(pair))}: {errors[pair]}"
        yield Finding("all-reduce", found, ok=False, means=means, remedy="have the network between them looked at")
    if speeds:
        yield from _bandwidth(reports, speeds, names)


def _bandwidth(reports: list[NodeReport], speeds: dict[frozenset[str], float], names: list[str]) -> Iterable[Finding]:
    median = statistics.median(speeds.values())
    slowest = min(speeds, key=speeds.__getitem__)
    found = f"{len(speeds)} pairs of nodes, all sums right; {median:.2f} GB/s"
    if len(speeds) > 1:
        found += f" in the middle, {speeds[slowest]:.2f} between {' and '.join(sorted(slowest))}"
    ports = [int(rate) for report in reports for f in report.findings if f.subject == "fabric"
             for rate in re.findall(r"(\d+) Gb/sec", f.found)]  # fmt: skip
    on_gpu = any(result["device"] != "cpu" for report in reports for result in report.sums)
    expected = max(ports, default=0) / 8
    if on_gpu and expected and median < SLOW_PORT * expected:
        yield Finding(
            "all-reduce", found, warns=True, means=f"a port carries {expected:.0f} GB/s, so NCCL may go by TCP",
            remedy="NCCL_DEBUG=INFO says which network it takes; see that nvidia_peermem is loaded",
        )  # fmt: skip
    else:
        yield Finding("all-reduce", found)
    # Of three nodes a slow one makes two of three pairs slow, so the middle of all pairs tells nothing.
    best = {node: max((speed for pair, speed in speeds.items() if node in pair), default=0.0) for node in names}
    usual = statistics.median(speed for speed in best.values() if speed)
    slow = {pair for pair, speed in speeds.items() if speed < SLOW * usual}
    means, remedy = "every step waits for it", "leave the node out, and have its network looked at"
    for node, count in blame(slow, names).items():
        own = statistics.median(speeds[pair] for pair in slow if node in pair)
        found = f"{own:.2f} GB/s with {count} others, {usual:.2f} elsewhere"
        yield Finding("all-reduce", found, warns=True, node=node, means=means, remedy=remedy)
    for pair in undecided(slow, names):
        found = f"{speeds[pair]:.2f} GB/s between {' and '.join(sorted(pair))}, {usual:.2f} elsewhere"
        yield Finding("all-reduce", found, warns=True, means=means, remedy="have the network between them looked at")


def blame(pairs: set[frozenset[str]], nodes: list[str]) -> dict[str, int]:
    """Nodes that explain why pairs fail, with the number of pairs each explains.

    A node is to blame for its pairs if it fails with more than one other. Of a pair
    that stands alone either may be.
    """
    left, found = set(pairs), {}
    while left:
        degrees = Counter(node for pair in left for node in pair)
        worst = max(nodes, key=lambda node: degrees[node])
        if degrees[worst] < 2:
            break
        found[worst] = degrees[worst]
        left = {pair for pair in left if worst not in pair}
    return found


def undecided(pairs: set[frozenset[str]], nodes: list[str]) -> list[frozenset[str]]:
    """The pairs that `blame` finds no one node for."""
    guilty = set(blame(pairs, nodes))
    return sorted((pair for pair in pairs if not pair & guilty), key=sorted)


def _consequence(finding: Finding) -> tuple[str, str] | None:
    """What follows, and what to do, where nodes differ in this; None where they may."""
    if finding.subject in ("code", "python") or _is_version(finding):
        return HARDWARE if finding.subject == "driver" else PROGRAMS
    if finding.subject in ("GPUs", "driver", "fabric", "device"):
        return HARDWARE
    return FILES if finding.subject == "model" or finding.subject.startswith("shards of ") else None


def _is_version(finding: Finding) -> bool:
    return re.fullmatch(r"[\w.]*\d[\w.+]*", finding.found) is not None


def _some(nodes: list[str]) -> str:
    return ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")
