"""What runs once on each node: the deepspeed launcher's half for one node, with the ranks there."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.nodes import find_machines, named_machines
from megablip.config import load_config
from megablip.engine.status import ATTEMPT, EXIT_CODES, RunStatus
from megablip.engine.topology import node_name
from megablip.errors import MegablipError
from megablip.launch import RankGroup, StoppedBeforeStart


def run_node(
    config_path: Path,
    *,
    hostfile: Path | None = None,
    nodes: list[str] | None = None,
    meeting_place: tuple[str, int] | None = None,
) -> int:
    """Start this node's ranks of a run that is prepared, and wait for them; the exit code.

    Under `supervise` that is the deepspeed launcher's, so that srun ends the other nodes where
    this one has failed; who is started by hand gets that of the run's outcome.

    Args:
        config_path: RUN/config.yaml.
        hostfile: see `find_machines`.
        nodes, meeting_place: see `named_machines`; from the supervisor.
    """
    supervised = ATTEMPT in os.environ
    status = RunStatus.of_rank(config_path.parent)
    try:
        # A job's end may be told by srun, by Slurm itself and by whoever cancels it.
        with RankGroup(patient=supervised) as ranks:
            config = load_config(config_path)
            if nodes and meeting_place:
                machines = named_machines(nodes, config.engine.ranks, meeting_place)
            else:
                machines = find_machines(os.environ, config.engine.ranks, hostfile)
            return_code = ranks.run(config, config_path, machines, status)
    except StoppedBeforeStart:
        return EXIT_CODES["stopped"]
    except MegablipError as error:
        if supervised:
            status.fail(f"node {node_name()}: {error}")
        raise
    return return_code if supervised else EXIT_CODES[status.current.get("outcome", "failed")]
