"""`megablip doctor [RECIPE]`: what this machine has, whether a recipe could start, and what follows from it."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from megablip.config import Config, load_config
from megablip.doctor.finding import Finding, attempted, show
from megablip.doctor.recipe import check_recipe
from megablip.engine.topology import computes_on_gpu, has_gpu


def doctor(recipe: Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> int:
    """Print the findings; the exit code: 0 if a run may start, else 1.

    Raises:
        ConfigError: the recipe can't be read.
    """
    config = load_config(recipe, overrides) if recipe else None
    findings = all_findings(config) + (check_recipe(config, on_gpu=has_gpu()) if config else [])
    show(findings)
    return int(any(not finding.ok for finding in findings))


def all_findings(config: Config | None = None) -> list[Finding]:
    """Of this machine; with a recipe, for that one's precision, heads and choice of attention."""
    return [*packages(), *device(config), *stale_builds(), _disk()]


def packages() -> list[Finding]:
    """Whether the versions are those that megablip was made for."""
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


def device(config: Config | None = None) -> list[Finding]:
    """GPUs, and the backend that attention runs on."""
    import torch

    wanted = config.model.attention if config else "auto"
    if not computes_on_gpu():
        found = f"no GPU; {os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), gloo"
        runs = wanted not in ("flash_attn", "torch_varlen")
        attention = Finding(
            "attention",
            "SDPA per document, as there is no GPU" if runs else f"model.attention is {wanted}, and there is no GPU",
            ok=runs,
            remedy="" if runs else "set it to auto, or run where there is a GPU",
        )
        return [Finding("device", found), attention]
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    found = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
    return [Finding("device", found), *attempted("attention", lambda: _attention(config, wanted))]


def _attention(config: Config | None, wanted: str) -> Iterator[Finding]:
    import torch

    from megablip.model.attention import head_sizes, select_backend
    from megablip.model.blip3 import Blip3Config

    heads, dtype = (), torch.bfloat16
    if config:
        model = Blip3Config.of_run(config.model)
        heads = head_sizes(model.text_config, model.sampler)
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    yield Finding("attention", str(select_backend("cuda", dtype, heads, wanted)))


def stale_builds() -> list[Finding]:
    """A killed build of a DeepSpeed op leaves a lock that every later run waits on, silently."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    stale = [lock for lock in root.glob("**/lock") if time.time() - lock.stat().st_mtime > 3600]
    if not stale:
        return [Finding("extension builds", "no stale lock", True)]
    return [Finding("extension builds", f"stale lock {lock}", False, f"rm {lock}") for lock in stale]


def _disk() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("disk", f"{free_gib:.0f} GiB free here", free_gib > 1, "" if free_gib > 1 else "free some space")
