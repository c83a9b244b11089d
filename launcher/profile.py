"""What a job has to know of a cluster: one small YAML file, a profile.

    profile = load_profile("h100_infiniband")        # of launcher/profiles
    profile = load_profile("clusters/ours.yaml")     # or a file of one's own

An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from megablip.config import YAML_ERRORS, Section, explain
from megablip.errors import ConfigError

PROFILES = Path(__file__).parent / "profiles"
MAX_SIGNAL_LEAD_S = 65535  # of sbatch's --signal

# What Slurm's own names, lists of nodes and expressions of features are made of. Such words stand in the head of a
# script, which Slurm reads and no shell; blanks, quotes and # would end them there.
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@%+/=&|*\[\]()~^-]+$")]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
_Path = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


class Container(Section):
    """The image that ranks run in.

    The batch step itself runs outside, since it calls srun and scontrol; its interpreter (`python` of the profile)
    needs neither torch nor a GPU.
    """

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: NVIDIA's plugin of srun, with enroot; apptainer: the program of that name, started by srun."""
    image: _Path
    """What `srun --container-image` or `apptainer exec` takes."""
    mounts: list[_Path] = Field([])
    """`/path` or `/path:/path/inside`. The checkout, data, models, runs, scratch and cache must be seen inside at
    the paths that they have outside."""
    python: _Path = "python"
    """Interpreter inside."""


class ClusterProfile(Section):
    """A kind of node, and how its jobs are asked for."""

    partition: _Word | None = None
    """None: the cluster's default, as with all that follow."""
    account: _Word | None = None
    qos: _Word | None = None
    constraint: _Word | None = None
    """Features that nodes must have."""
    gpus_per_node: int = Field(8, ge=0)
    gpu_type: _Word | None = None
    """As Slurm names it (`scontrol show node`, Gres), where a partition has several."""
    ranks_per_node: int | None = Field(None, ge=1)
    """Data-parallel ranks of a node; None: one for each GPU."""
    cpus_per_node: int | None = Field(None, ge=1)
    """None with `exclusive`: all of the node; else what the cluster gives by itself, often one."""
    memory: _Word | None = None
    """Of a node, as `--mem` takes it; 0: all."""
    exclusive: bool = False
    """Share nodes with no other job."""
    time: str
    """Limit of one job, as Slurm writes it: `24:00:00`, `2-12:00:00`. A run that needs more is requeued."""
    signal_lead_s: int = Field(300, ge=30, le=MAX_SIGNAL_LEAD_S)
    """Seconds before the limit at which the run is asked to save and end: a step and a save must fit in. Slurm may
    signal up to 60 s earlier."""
    exclude: list[_Word] = Field([])
    """Nodes that are not to be used, as Slurm writes them: `gpu[003-007]`."""
    options: list[_Word] = Field([])
    """Further options of sbatch, one each, such as `--reservation=NAME`."""
    modules: list[_Word] = Field([])
    """Loaded in this order before anything else."""
    container: Container | None = None
    python: _Path | None = None
    """Interpreter on all nodes; None: the one that writes the script, which nodes then must see at the same path."""
    network_interface: _Word | None = None
    """The interface on which nodes reach each other by TCP, as NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME take it.
    None: NCCL takes the first that is up, gloo the one that the host's name leads to."""
    scratch: _Path | None = None
    """Folder on each node's own disk for temporary files and copies of remote shards (TMPDIR). Here and in `cache`
    variables of the job such as $USER or $SLURM_JOB_ID may stand."""
    cache: _Path | None = None
    """Folder for compiled kernels that outlives jobs, best on each node's own disk: nodes that build at the same time
    on a network file system wait for each other's locks."""
    environment: dict[_Name, _Text] = Field({})
    """Of all processes. Values are taken as they are; nothing in them is expanded."""

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_quoted(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML 1.1 reads 24:00:00 as a number of base 60
            raise ValueError("write it in quotes, such as '24:00:00': YAML reads it as a number otherwise")
        return value

    @model_validator(mode="after")
    def _lead_fits(self) -> ClusterProfile:
        if self.time_s <= self.signal_lead_s + 60:
            raise ValueError(
                f"a time of {self.time} leaves nothing to train in: the signal comes up to "
                f"{self.signal_lead_s + 60} s before its end"
            )
        return self

    @model_validator(mode="after")
    def _has_ranks(self) -> ClusterProfile:
        if not (self.ranks_per_node or self.gpus_per_node):
            raise ValueError("gpus_per_node is 0, so ranks_per_node must say how many ranks a node has")
        if self.gpus_per_node and (self.ranks_per_node or 0) > self.gpus_per_node:
            raise ValueError(f"{self.ranks_per_node} ranks_per_node need as many GPUs, not {self.gpus_per_node}")
        return self

    @property
    def time_s(self) -> int:
        """Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
        match = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?", self.time)
        if not match:
            raise ValueError(f"time: '{self.time}' is none that Slurm knows; write '24:00:00' or '2-12:00:00'")
        days, first, second, third = (None if part is None else int(part) for part in match.groups())
        if days is not None:
            return days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
        if third is not None:
            return first * 3600 + second * 60 + third
        return first * 60 + (second or 0)

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def interpreter(self) -> str:
        """Of the batch step."""
        return self.python or sys.executable

    def step_command(self, words: list[str], folder: Path) -> list[str]:
        """What `srun [options] ...` is given to run `python WORDS` on a node, in the container if there is one.

        The first of the result are options of srun (pyxis), so no option may stand behind it.

        Args:
            folder: where it runs.
        """
        container = self.container
        if container is None:
            return [self.interpreter, *words]
        if container.runtime == "pyxis":
            mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
            options = [f"--container-image={container.image}", *mounts, f"--container-workdir={folder}"]
            return [*options, container.python, *words]
        binds = [word for mount in container.mounts for word in ("--bind", mount)]
        gpus = ["--nv"] if self.gpus_per_node else []
        return [
            "apptainer", "exec", *gpus, *binds, "--pwd", str(folder), container.image, container.python, *words
        ]  # fmt: skip


def load_profile(name_or_path: str | Path) -> ClusterProfile:
    """A shipped profile by its name, or a file of one's own.

    Raises:
        ConfigError: no such profile, broken YAML, unknown key, wrong value.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = PROFILES / f"{name_or_path}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(entry.stem for entry in PROFILES.glob("*.yaml")))
        raise ConfigError(
            "the cluster profile does not exist", where=str(path), remedy=f"give a file, or one of: {known}"
        ) from None
    except (OSError, *YAML_ERRORS) as error:
        raise ConfigError(f"the cluster profile can't be read: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise ConfigError("the cluster profile is not a mapping of keys to values", where=str(path))
    try:
        return ClusterProfile.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, ClusterProfile), where=str(path)) from None


def dump_profile(profile: ClusterProfile) -> str:
    """The profile as YAML that `load_profile` reads back."""
    return yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False)
