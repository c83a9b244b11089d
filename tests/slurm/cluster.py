"""A real Slurm on this machine: munged, one slurmctld, and nodes that each have a slurmd.

with Cluster(folder, {"two": ["n1", "n2"]}) as cluster:
    job = cluster.submit("--wrap", "srun hostname", "--nodes=2")
    job.wait()

A node is a set of Linux namespaces: its own host name, processes, mounts and
/dev/shm; the network and the disks are the machine's.  So a node can lose its
power, or a disk that it can write to, while the other one keeps them.  Nothing
of the machine's own configuration is read or changed; root is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PACKAGES = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
NAMESPACES = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
# Time-outs are short, so that what waits for them ends soon.  A requeued job waits until its
# credential expires (`cred_expire`), and a node without its daemon is lost after SlurmdTimeout.
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmctldLogFile={folder}/slurmctld.log
SlurmctldPidFile={folder}/slurmctld.pid
StateSaveLocation={folder}/state
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=20
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
"""
# What each node says it has, whatever the machine has: GPUs, too, so that scripts that ask for them are accepted.
GPUS = 8
RESOURCES = f"CPUs=8 RealMemory=4000 Gres=gpu:{GPUS}"


class Missing(Exception):
    """Slurm can't be had here; says why."""


def install() -> None:
    """Debian's packages, where they are missing.

    Raises:
        Missing: no root, no apt-get, no packages, or namespaces are not allowed.
    """
    if os.geteuid() != 0:
        raise Missing("a Slurm with nodes of its own needs root")
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program)})
    if missing:
        if not shutil.which("apt-get"):
            raise Missing(f"{', '.join(missing)} are not installed, and there is no apt-get to install them with")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-q", "--yes", "--no-install-recommends", *missing]):
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"apt-get could not install {', '.join(missing)}: {done.stderr[-500:]}")
    done = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"namespaces are not allowed here: {done.stderr.strip()}")


class Cluster:
    """Starts with the `with` statement, and ends with it, and with this process however that ends.

    Args:
        folder: for everything the daemons write; a short path (it holds a socket).
        partitions: names of nodes by partition; the first one is the default.
    """

    def __init__(self, folder: Path, partitions: dict[str, list[str]]):
        self.folder, self.partitions = folder, partitions
        self.nodes = {name: Node(name, folder) for members in partitions.values() for name in members}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir(parents=True)
        (self.folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *self.nodes)))
        ports = iter(_free_ports(1 + len(self.nodes)))
        config = CONFIG.format(host=socket.gethostname(), port=next(ports), folder=self.folder)
        for name in self.nodes:
            config += f"NodeName={name} NodeAddr=127.0.0.1 Port={next(ports)} {RESOURCES}\n"
        for number, (name, members) in enumerate(self.partitions.items()):
            default = "YES" if number == 0 else "NO"
            config += f"PartitionName={name} Nodes={','.join(members)} Default={default} MaxTime=INFINITE State=UP\n"
        (self.folder / "slurm.conf").write_text(config)
        for number in range(GPUS):  # Slurm counts files
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        try:
            self._start_daemons(key)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_daemons(self, key: Path) -> None:
        munge = self.folder / "munge"
        options = {"key-file": key, "socket": f"{munge}.socket", "pid-file": f"{munge}.pid", "log-file": f"{munge}.log",
                   "seed-file": f"{munge}.seed"}  # fmt: skip
        # --force: the folder may lie in one that is root's alone, which is all that is needed here.
        self._start("munged", "--foreground", "--force", *(f"--{name}={value}" for name, value in options.items()))
        wait_until(Path(f"{munge}.socket").exists, "munged's socket", 30)
        self._start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in self.nodes.values():
            node.power_on()
        wait_until(self.is_idle, "nodes", 60, self.logs)

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.power_off()
        for daemon in reversed(self._daemons):
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()

    def _start(self, *command: str) -> None:
        output = (self.folder / f"{command[0]}.out").open("w")
        self._daemons.append(_popen(list(command), stdout=output, stderr=subprocess.STDOUT))

    def run(self, *command: str, check: bool = True) -> str:
        """A command of Slurm's; its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *options: str) -> Job:
        return Job(self, int(self.run("sbatch", "--parsable", *options)))

    def restore(self) -> None:
        """End all jobs, and bring back the nodes that were lost."""
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        self.run("scancel", "--user=root")
        for node in self.nodes.values():
            node.restore()
        wait_until(self.is_idle, "idle nodes", 90, self.logs)

    def is_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).splitlines()
        return set(states) == {f"{name} idle" for name in self.nodes}

    def logs(self) -> str:
        """Ends of what the daemons have written."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in files)


class Node:
    """One node. Process ids are this machine's, not the node's own."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self._folder = folder
        self._unshare: subprocess.Popen[bytes] | None = None

    def power_on(self) -> None:
        # The first process of a node waits, and buries the orphans of the others.
        script = (
            f"hostname {self.name} && mount --bind {self._folder}/hosts /etc/hosts"
            " && mount -t tmpfs tmpfs /dev/shm && echo ready && while :; do sleep 1000 & wait; done"
        )
        self._unshare = _popen([*NAMESPACES, "bash", "-c", script], stdout=subprocess.PIPE)
        assert self._unshare.stdout.readline() == b"ready\n", f"{self.name} does not start"
        self.start_slurmd()

    def power_off(self) -> None:
        """All its processes end at once, as where the power is gone."""
        if self._unshare:
            self._unshare.kill()
            self._unshare.wait()
            self._unshare = None

    def restore(self) -> None:
        if not self._unshare:
            self.power_on()
        elif not self.processes(program="slurmd"):
            self.start_slurmd()

    def start_slurmd(self) -> None:
        self.run("slurmd", "-N", self.name, "-f", str(self._folder / "slurm.conf"))

    def kill_slurmd(self) -> None:
        """kill -9 of its daemon; the steps that run on it go on."""
        for process in self.processes(program="slurmd"):
            process.kill()

    def run(self, *command: str) -> None:
        """A command on the node, as its root."""
        inside = ["nsenter", f"--target={self._init().pid}", "--mount", "--uts", "--pid", "--"]
        done = subprocess.run([*inside, *command], capture_output=True, text=True, timeout=60)
        assert not done.returncode, f"{command} on {self.name} ended with {done.returncode}: {done.stderr}"

    def processes(self, word: str = "", program: str = "") -> list[psutil.Process]:
        """Those with `word` among the words of their command line, and of this program."""
        found = []
        for process in self._init().children(recursive=True):
            with suppress(psutil.Error):
                if (not word or word in process.cmdline()) and program in ("", process.name()):
                    found.append(process)
        return found

    def _init(self) -> psutil.Process:
        return psutil.Process(self._unshare.pid).children()[0]


@dataclass
class Job:
    """A job, also after it was requeued."""

    cluster: Cluster
    number: int

    def show(self) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", str(self.number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    @property
    def has_ended(self) -> bool:
        """For good: nothing will start it again."""
        return self.state in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

    def wait(self, timeout_s: float = 400) -> str:
        """Until it has ended; the state it ended in."""
        wait_until(lambda: self.has_ended, f"end of job {self.number}", timeout_s, self.describe)
        return self.state

    def describe(self) -> str:
        fields = self.show()
        names = ("JobState", "Reason", "Restarts", "RunTime", "NodeList", "ExitCode")
        output = Path(fields.get("StdOut", ""))
        text = output.read_text(errors="replace") if output.is_file() else ""
        return f"{ {name: fields.get(name) for name in names} }\n{text[-6000:]}"


def wait_until(
    condition: Callable[[], bool], what: str, timeout_s: float, describe: Callable[[], str] = str, poll_s: float = 0.2
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s\n{describe()}"
        time.sleep(poll_s)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _popen(command: list[str], **options) -> subprocess.Popen[bytes]:
    """A child that is killed when this process ends, however it does."""
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *command], start_new_session=True, **options)
