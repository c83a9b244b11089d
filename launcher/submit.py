"""Hands scripts to Slurm."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megablip.errors import ConfigError


def submit(script: Path, options: list[str] | tuple[str, ...] = ()) -> int:
    """Give a script to sbatch, from its own folder, where the log goes; the job's number.

    Args:
        options: of sbatch, beside those in the script.

    Raises:
        ConfigError: there is no Slurm here, or it refuses the job; with its own words.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options, script.name], cwd=script.parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise ConfigError(
            "sbatch is not here", where=str(script), remedy="submit from a login node of the cluster"
        ) from None
    number = done.stdout.strip().partition(";")[0]  # JOB or JOB;CLUSTER
    if done.returncode or not number.isdecimal():
        words = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise ConfigError(
            f"Slurm refuses the job: {words}",
            where=str(script),
            remedy="mend the cluster profile; sinfo and sacctmgr show what there is",
        )
    return int(number)
