"""`megablip doctor`: what this machine has, and what follows from it."""

from __future__ import annotations

import os
import platform
import shutil
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do if it is not right."""

    subject: str
    found: str
    ok: bool
    remedy: str = ""


def doctor() -> int:
    """Print the findings; the number of those that are not right, as exit code (0 or 1)."""
    findings = all_findings()
    table = Table("", "what", "found", "to do")
    for finding in findings:
        table.add_row("ok" if finding.ok else "!!", finding.subject, finding.found, finding.remedy)
    Console().print(table)
    return int(any(not finding.ok for finding in findings))


def all_findings() -> list[Finding]:
    return [*_packages(), *_device(), *_stale_builds(), _disk()]


def _packages() -> list[Finding]:
    findings = [Finding("python", platform.python_version(), True)]
    try:
        requirements = metadata.requires("megablip") or []
    except metadata.PackageNotFoundError:
        return [*findings, Finding("megablip", "run from a checkout, so what it requires was not checked", True)]
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(requirement.name, "missing", False, f"pip install '{requirement}'"))
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        findings.append(Finding(requirement.name, version, fits, "" if fits else f"pip install '{requirement}'"))
    return findings


def _device() -> list[Finding]:
    import torch

    from megablip.model.attention import select_backend

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        found = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
        device = "cuda"
    else:
        found = f"no GPU; {os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), gloo"
        device = "cpu"
    attention = select_backend(device, torch.bfloat16)
    return [Finding("device", found, True), Finding("attention", str(attention), True)]


def _stale_builds() -> list[Finding]:
    """A killed build of a DeepSpeed op leaves a lock that every later run waits on, silently."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    stale = [lock for lock in root.glob("**/lock") if time.time() - lock.stat().st_mtime > 3600]
    if not stale:
        return [Finding("extension builds", "no stale lock", True)]
    return [Finding("extension builds", f"stale lock {lock}", False, f"rm {lock}") for lock in stale]


def _disk() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("disk", f"{free_gib:.0f} GiB free here", free_gib > 1, "" if free_gib > 1 else "free some space")
