"""Before a job begins to train: checks of each node, and between nodes.

`supervise` calls `preflight`, which starts `python -m launcher preflight-node` once on
each node by srun.  A node prints what it finds as lines of JSON, so that one which
can't write still tells; one that says nothing is named with srun's own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.profile import ClusterProfile
from megablip.config import Config
from megablip.doctor import Finding


@dataclass(frozen=True)
class Report:
    """What was found on all nodes and between them."""

    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether the job may start on these nodes."""
        return all(finding.ok for finding in self.findings)

    @property
    def bad_nodes(self) -> list[str]:
        """Nodes, by Slurm's name, that the run could go on without; empty if what is wrong is wrong everywhere."""
        raise NotImplementedError

    def print(self) -> None:
        """The table, of what is wrong or worth knowing at full length."""
        raise NotImplementedError


def preflight(
    srun: list[str], profile: ClusterProfile, config_path: Path, hosts: list[str], address: str, port: int
) -> Report:
    """Check the nodes of an allocation together.

    Args:
        srun: `srun` with the options that give one task on each of `hosts`.
        hosts: Slurm's names of the nodes, in the order of SLURM_NODEID.
        address: of the first node, where ranks will meet.
        port: there; it is tried.
    """
    raise NotImplementedError


def check_node(config: Config) -> list[Finding]:
    """What can be seen on one node alone."""
    raise NotImplementedError


def compare(findings_by_node: dict[str, list[Finding]]) -> list[Finding]:
    """What the nodes' findings say together: who differs, who is slow, who is missing."""
    raise NotImplementedError
