"""What one node of a job can tell alone."""

from __future__ import annotations

import csv
import hashlib
import os
import resource
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import megablip
from megablip.config import Config
from megablip.doctor import device, packages, stale_builds
from megablip.doctor.finding import Finding, attempted
from megablip.doctor.recipe import check_batch, check_paths, check_space, check_tokens
from megablip.engine.topology import has_gpu

INFINIBAND = Path("/sys/class/infiniband")
INTERFACES = Path("/sys/class/net")
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
CACHE_VARIABLES = ("TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
BUSY_MIB = 1024  # of a GPU's memory before anything of ours is there
ENOUGH_LOCKED_BYTES = 64 << 30
SMI_FIELDS = ("name", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")


def check_node(config: Config) -> Iterator[Finding]:
    """What can be seen on one node alone, as it becomes known."""
    yield code()
    yield from packages()
    yield from stale_builds()
    yield from gpus(config.engine.ranks)
    yield from fabric()
    yield from interfaces()
    yield from folders()
    yield from check_paths(config)
    yield from device(config)


def check_common(config: Config, nodes: int) -> Iterator[Finding]:
    """What is the same on all nodes, so that one of them looks at it."""
    yield from check_tokens(config)
    yield from check_space(config)
    yield from check_batch(config, nodes, has_gpu())


def code() -> Finding:
    """megablip's version and a hash of its source: nodes with copies of their own may differ."""
    folder = Path(megablip.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return Finding("code", f"megablip {megablip.__version__}, {digest.hexdigest()[:8]}")


def gpus(ranks: int) -> list[Finding]:
    """The GPUs by nvidia-smi; one for each rank must be there, healthy and free."""
    if not has_gpu():
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("GPUs", f"nvidia-smi does not answer: {error}", ok=False, remedy="have the node looked at")]
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
    rows = [dict(zip(SMI_FIELDS, row, strict=True)) for row in rows if len(row) == len(SMI_FIELDS)]
    if done.returncode or not rows:
        words = (done.stderr or done.stdout).strip()
        return [Finding("GPUs", f"nvidia-smi fails: {words}", ok=False, remedy="have the node looked at")]
    given = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if len(given) < len(rows) and all(index.isdecimal() and int(index) < len(rows) for index in given):
        rows = [rows[int(index)] for index in given] or rows  # the others are other jobs'
    count = len(given) or len(rows)
    names = Counter(row["name"] for row in rows)
    found = [
        Finding(
            "GPUs",
            ", ".join(f"{number} x {name}" for name, number in sorted(names.items())) + f", {count} for this job",
            ok=count >= ranks,
            means="" if count >= ranks else f"{ranks} ranks of a node need one each",
            remedy="" if count >= ranks else "ask for as many (gpus_per_node), or have the node looked at",
        ),
        Finding("driver", rows[0]["driver_version"]),
    ]
    for number, row in enumerate(rows):
        if row["memory.used"].isdecimal() and int(row["memory.used"]) > BUSY_MIB:
            found.append(
                Finding(
                    f"GPU {number}",
                    f"{row['memory.used']} MiB are in use",
                    warns=True,
                    means="another job, or what was left of one, shares it; memory may run out",
                    remedy="ask for the node alone (exclusive), or have the processes ended: nvidia-smi shows them",
                )
            )
        errors = row["ecc.errors.uncorrected.volatile.total"]
        if errors.isdecimal() and int(errors):
            found.append(
                Finding(
                    f"GPU {number}",
                    f"{errors} uncorrected memory errors since its start",
                    ok=False,
                    means="results may be wrong, and the next error ends the run",
                    remedy="leave the node out, and have the GPU reset or replaced",
                )
            )
    return found


def fabric() -> list[Finding]:
    """InfiniBand or RoCE ports, and the limit on the memory that they need locked."""
    ports = Counter()
    for state in sorted(INFINIBAND.glob("*/ports/*/state")):
        active = "ACTIVE" in _read(state)
        kind, rate = _read(state.with_name("link_layer")), _read(state.with_name("rate"))
        ports[f"{kind} {rate}" if active else f"{kind} not active"] += 1
    if not ports:
        return [Finding("fabric", "no InfiniBand or RoCE; TCP")] if has_gpu() else []
    found = [Finding("fabric", ", ".join(f"{count} x {port}" for port, count in sorted(ports.items())))]
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < ENOUGH_LOCKED_BYTES:
        found.append(
            Finding(
                "locked memory",
                f"limited to {soft / 2**20:,.0f} MiB",
                warns=True,
                means="buffers of InfiniBand are locked; NCCL may fail with ibv_reg_mr or create_qp",
                remedy='take the node\'s own limit: options: ["--propagate=NONE"] in the profile',
            )
        )
    return found


def interfaces() -> list[Finding]:
    """Whether the interfaces that are named exist; gloo and NCCL say so less clearly, and later."""
    found = []
    there = {path.name for path in INTERFACES.iterdir()} if INTERFACES.is_dir() else set()
    for variable in INTERFACE_VARIABLES:
        wanted = os.environ.get(variable, "")
        if not wanted or wanted.startswith("^"):
            continue
        exact = wanted.startswith("=") or variable.startswith("GLOO")
        names = [name for name in wanted.removeprefix("=").split(",") if name]
        if not any(name == own if exact else own.startswith(name) for name in names for own in there):
            found.append(
                Finding(
                    "network interface",
                    f"{variable} is {wanted}, and there are {', '.join(sorted(there))}",
                    ok=False,
                    means="the ranks of this node can't reach the others",
                    remedy="set network_interface in the profile to one that all nodes have (`ip -br address`)",
                )
            )
    return found


def folders() -> list[Finding]:
    """Makes what the profile's scratch and cache ask for."""
    found = []
    for variable in CACHE_VARIABLES:
        if folder := os.environ.get(variable):
            found += attempted(variable, lambda folder=folder, variable=variable: _make(variable, Path(folder)))
    return found


def _make(variable: str, folder: Path) -> Iterator[Finding]:
    folder.mkdir(parents=True, exist_ok=True)
    usable = os.access(folder, os.W_OK | os.X_OK)
    remedy = "" if usable else "correct scratch or cache in the profile"
    yield Finding(variable, f"{folder} {'is there' if usable else 'can not be written'}", ok=usable, remedy=remedy)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"
