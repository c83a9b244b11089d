"""Which machines an attempt has, and which of them this one is.

    SLURM      srun has started one process on each node: python -m launcher node RUN/config.yaml
    torchrun   so has it, with --nproc-per-node 1
    hostfile   somebody has, by hand or by a parallel shell: ... node RUN/config.yaml --hostfile HOSTS

One function looks at all three, so what starts the ranks knows none of them.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from megablip.engine.topology import DEFAULT_PORT, hosts_of, job_port, node_name, rendezvous
from megablip.errors import ConfigError
from megablip.launch import Machines


def find_machines(environment: Mapping[str, str], ranks: int, hostfile: Path | None = None) -> Machines:
    """The machines of this process's attempt.

    Args:
        environment: of this process.
        ranks: of each machine, where no hostfile says otherwise.
        hostfile: as DeepSpeed takes it; it wins over the environment.

    Raises:
        ConfigError: a hostfile that can't be read or lacks this machine; several processes on one
            machine, which would each start all of its ranks.
    """
    if hostfile:
        return _of_hostfile(hostfile, environment)
    if "GROUP_RANK" in environment and "MASTER_ADDR" in environment:
        return _of_torchrun(environment, ranks)
    if "SLURM_STEP_NODELIST" in environment and "SLURM_NODEID" in environment:
        return _of_slurm(environment, ranks)
    return Machines.alone(ranks)


def named_machines(nodes: list[str], ranks: int, meeting_place: tuple[str, int]) -> Machines:
    """Machines that the supervisor has chosen, whatever the environment says.

    Args:
        nodes: their names, in the order of ranks.
        ranks: of each.
        meeting_place: address of the first one, and port there.

    Raises:
        ConfigError: this machine is none of them.
    """
    if node_name() not in nodes:
        raise ConfigError(f"this machine, {node_name()}, is not among those of the attempt: {', '.join(nodes)}")
    return Machines(dict.fromkeys(nodes, ranks), nodes.index(node_name()), *meeting_place)


def all_machines(ranks: int, hostfile: Path | None = None) -> Machines:
    """The machines that an attempt would have which is started from here; for a reader, who may be on another one.

    Raises:
        ConfigError: a hostfile that can't be read.
    """
    if hostfile:
        slots = read_hostfile(hostfile)
        return Machines(slots, 0, next(iter(slots)), DEFAULT_PORT)
    if nodes := os.environ.get("SLURM_JOB_NODELIST"):
        hosts = hosts_of(nodes)
        return Machines(dict.fromkeys(hosts, ranks), 0, hosts[0], job_port(int(os.environ["SLURM_JOB_ID"]), 0))
    return Machines.alone(ranks)


def _of_slurm(environment: Mapping[str, str], ranks: int) -> Machines:
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    if not re.fullmatch(r"1(\(x\d+\))?", tasks):
        raise ConfigError(
            f"srun starts {tasks} tasks a node, and each would start all ranks of its node",
            where="SLURM_STEP_TASKS_PER_NODE",
            remedy="start one: srun --ntasks-per-node=1",
        )
    hosts = hosts_of(environment["SLURM_STEP_NODELIST"])
    meeting = rendezvous(environment)
    return Machines(
        dict.fromkeys(hosts, ranks),
        int(environment["SLURM_NODEID"]),
        meeting["MASTER_ADDR"],
        int(meeting["MASTER_PORT"]),
    )


def _of_torchrun(environment: Mapping[str, str], ranks: int) -> Machines:
    if environment.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"torchrun starts {environment['LOCAL_WORLD_SIZE']} processes here, and each would start all ranks",
            where="LOCAL_WORLD_SIZE",
            remedy="start one: torchrun --nproc-per-node 1; or the ranks themselves: torchrun -m megablip.train",
        )
    nodes = int(environment["GROUP_WORLD_SIZE"])
    # torchrun's agent keeps its own store at its port.
    port = int(environment["MASTER_PORT"]) + 1
    slots = {f"node {number}": ranks for number in range(nodes)}
    return Machines(slots, int(environment["GROUP_RANK"]), environment["MASTER_ADDR"], port)


def _of_hostfile(path: Path, environment: Mapping[str, str]) -> Machines:
    slots = read_hostfile(path)
    own = {node_name(), socket.gethostname()}
    own |= {name.split(".")[0] for name in own}
    places = [number for number, host in enumerate(slots) if host in own or host.split(".")[0] in own]
    if len(places) != 1:
        raise ConfigError(
            f"the hostfile names this machine {len(places)} times",
            where=f"{path}: {', '.join(slots)}; this is {' or '.join(sorted(own))}",
            remedy="name each machine once, as `hostname` prints it there",
        )
    port = int(environment.get("MASTER_PORT", DEFAULT_PORT))
    return Machines(slots, places[0], environment.get("MASTER_ADDR", next(iter(slots))), port)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each host of a DeepSpeed hostfile: lines such as `gpu7 slots=8`, and comments.

    Raises:
        ConfigError: it can't be read, or a line is none.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the hostfile can't be read: {error}", where=str(path)) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"([^\s=]+)\s+slots=([1-9]\d{0,4})", words)
        if not match or match[1] in slots:
            raise ConfigError(
                f"{words!r} names a host twice" if match else f"{words!r} is no host with its slots",
                where=f"{path}, line {number}",
                remedy="write one line for each host: NAME slots=RANKS",
            )
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError("the hostfile names no host", where=str(path))
    return slots
