"""Who this process is among the ranks, and how they meet.

Ranks are started by the deepspeed launcher, torchrun, or bare srun; the five
variables that torch.distributed needs are filled in here from whichever of
them is there, so nothing falls back to MPI discovery.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from megablip.engine.startup import spare_builds
from megablip.errors import ConfigError

_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # of Linux, and of Linux under Windows
_DEVICES = Path("/dev")
DEFAULT_PORT = 29500  # torch's own
_FIRST_PORT, _PORTS = 10000, 20000  # below the range that systems give to outgoing connections


@dataclass(frozen=True, slots=True)
class Topology:
    """This process's place. `rank` and `world` are data-parallel."""

    rank: int
    world: int
    local_rank: int
    device: Any  # torch.device
    ranks_per_node: int = 1  # 1 too where nodes have different numbers of ranks

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints on the first rank only."""
        if self.is_first:
            print(text, flush=True)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank. Small values only."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.gather(None)

    def leave(self) -> NoReturn:
        """End this process, together with the other ranks' and successfully.

        Straight to the system: gloo's threads now and then abort the
        interpreter's own exit, which a launcher takes for a crash.
        """
        self.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU that is not hidden from this process; found without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path(device).exists() for device in _GPU_DEVICES)


def gpus_there() -> int:
    """NVIDIA GPUs of this machine, hidden ones too; 0 where they have no files of their own, as under Windows."""
    return len(list(_DEVICES.glob("nvidia[0-9]*")))


def node_name() -> str:
    """SLURM's name of this node, which may be another than the host's, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def announce_cpu() -> None:
    """Tell DeepSpeed where there is no GPU; it would search, and warn, at each import."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def computes_on_gpu() -> bool:
    """Whether this process's model goes to a GPU: if torch has one, and DeepSpeed's variable does not say otherwise.

    DeepSpeed goes by that variable; to go by another rule here would end in tensors on two devices.
    """
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def prepare_device() -> Any:
    """Switch cuDNN's attention off; the torch.device of this process's model, if it is the only rank.

    torch prefers cuDNN's on Hopper, and that one makes a plan for every new shape, of tokens, tiles, or a
    cache: 0.1 s forward and backward on an H100, where torch's other kernels, which take any shape, need 1 ms.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", 0) if computes_on_gpu() else torch.device("cpu")


def init_distributed(timeout_s: int, threads: int = 0) -> Topology:
    """Join the process group: NCCL where there is a GPU, else gloo.

    Args:
        timeout_s: seconds after which a waiting collective fails.
        threads: CPU threads of this rank; 0 leaves torch's choice.
    """
    for name, value in rendezvous(os.environ).items():
        os.environ.setdefault(name, value)
    import torch

    on_gpu = prepare_device().type == "cuda"
    if on_gpu:
        os.environ["LOCAL_RANK"] = str(_own_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if threads:
        torch.set_num_threads(threads)

    # DeepSpeed calls names that newer torch renames; nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    spare_builds()
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
    )
    topology = Topology(
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"),
    )
    return replace(topology, ranks_per_node=_ranks_per_node(topology.gather(node_name())))


def _own_gpu(local_rank: int, there: int) -> int:
    """The one of the GPUs that this rank sees which is its own.

    Raises:
        ConfigError: there are fewer than ranks.
    """
    if there == 1:
        return 0  # srun --gpus-per-task=1: each rank sees its own GPU only
    if local_rank >= there:
        raise ConfigError(
            f"no GPU is left for this rank: on its machine it is number {local_rank}, from 0 on, of {there} GPUs",
            where=f"rank {os.environ.get('RANK')} on {node_name()}",
            remedy="start as many ranks as there are GPUs, or let them see more",
        )
    return local_rank


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables by which torch.distributed meets, as far as SLURM or nothing at all decides them.

    Under bare srun all but the meeting place is SLURM's. Rank 0 runs on the
    first node of the step; the port follows from job and step, so that two
    jobs on one node don't meet. A process started by hand is alone.

    Args:
        environment: of this process; what torchrun or the deepspeed launcher has set there wins.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    address = first_host(nodes) if nodes else environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    port = DEFAULT_PORT
    if "SLURM_JOB_ID" in environment:
        port = job_port(int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", 0)))
    return {
        "RANK": environment.get("SLURM_PROCID", "0"),
        # SLURM_NTASKS is the whole allocation's in a batch script; a step has its own count.
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def job_port(job: int, number: int) -> int:
    """A port for the number-th thing that a SLURM job starts: two of them, and two jobs, may share a node."""
    return _FIRST_PORT + (job + 7919 * number) % _PORTS  # a prime


def first_host(nodes: str) -> str:
    """First name of a SLURM node list: `gpu[003-007,9],login1` gives `gpu003`."""
    return hosts_of(nodes)[0]


def hosts_of(nodes: str) -> list[str]:
    """All names of a SLURM node list: `gpu[08-10],login1` gives gpu08, gpu09, gpu10 and login1."""
    hosts = []
    for pattern in re.split(r",(?![^\[]*\])", nodes):
        pieces = re.split(r"\[([^\]]*)\]", pattern)  # literal, ranges, literal, ranges, ...
        choices = [_numbers(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
        hosts += ["".join(parts) for parts in itertools.product(*choices)]
    return hosts


def _numbers(ranges: str) -> list[str]:
    """`003-005,9` gives 003, 004, 005 and 9."""
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers


def _ranks_per_node(hosts: list[str]) -> int:
    """Ranks of each node if all have the same number, side by side; else 1.

    Args:
        hosts: name of each rank's node, in rank order.
    """
    lengths = {len(list(run)) for _, run in itertools.groupby(hosts)}
    return lengths.pop() if len(lengths) == 1 else 1
