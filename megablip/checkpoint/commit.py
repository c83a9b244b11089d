"""A checkpoint is committed or it does not exist.

    RUN/checkpoints/step_00000500/
        rank_00000.safetensors ...  each rank's slices and random state
        data_state.npz              the state of every lane
        trainer_state.json          step, tokens, hashes, versions
        manifest.json               every file: size and SHA-256
        COMMITTED                   SHA-256 of the manifest; written last
    RUN/checkpoints/latest          name of the newest committed step

Everything is written to `step_N.tmp`, synced to disk, agreed on by all ranks,
renamed, and only then committed; `latest` moves after that, old checkpoints go
last.  A crash at any point leaves either the new checkpoint whole or the
earlier ones untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megablip.checkpoint.slices import rank_file
from megablip.engine.topology import Topology
from megablip.errors import CheckpointError

FORMAT_VERSION = 1
_MANIFEST, _COMMITTED, _LATEST = "manifest.json", "COMMITTED", "latest"
_DATA_STATE, _TRAINER_STATE = "data_state.npz", "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed, verified checkpoint."""

    folder: Path
    trainer_state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.trainer_state["step"]

    def lane_states(self) -> dict[int, np.ndarray]:
        """The state of each lane, int64 vectors."""
        with np.load(self.folder / _DATA_STATE, allow_pickle=False) as stored:
            return {int(name.removeprefix("lane_")): stored[name] for name in stored.files}

    def check_base(self, base: dict[str, str], path: str) -> None:
        """Raises CheckpointError if frozen weights or tokenizer are not those the run began with.

        Args:
            base: hashes by name, of what lies in `path` now.
        """
        for name, digest in base.items():
            if self.trainer_state["base"][name] != digest:
                raise CheckpointError(
                    f"the {name} is not the one this run began with",
                    where=f"{path}, {self.folder}",
                    remedy="give the folder the run began with, or start a new run_dir",
                )


class CheckpointStore:
    """The checkpoints of one run. All public methods but `committed` are collectives.

    Args:
        folder: RUN/checkpoints.
        keep: committed checkpoints that retention leaves.
    """

    def __init__(self, folder: Path, keep: int, topology: Topology):
        self._folder, self._keep, self._topology = folder, keep, topology
        self._damaged: set[Path] = set()
        self._saved: set[Path] = set()

    def save(
        self,
        step: int,
        write_rank_file: Callable[[Path], None],
        lane_states: dict[int, np.ndarray],
        trainer_state: dict[str, Any],
    ) -> Path:
        """Write and commit one checkpoint.

        Args:
            write_rank_file: writes this rank's slices to the given path.
            lane_states: of the lanes this rank owns.
            trainer_state: the same on all ranks.

        Raises:
            CheckpointError: on all ranks, if any could not write; earlier
                checkpoints are untouched and training can go on.
        """
        final = self._folder / f"step_{step:08d}"
        staging = final.with_suffix(".tmp")
        if final in self._saved:
            return final

        def write() -> dict[str, Any]:
            path = staging / rank_file(self._topology.rank)
            write_rank_file(path)
            return {"file": _describe(path), "lanes": lane_states}

        try:
            self._agree(lambda: self._prepare(final, staging), "prepare the folder")
            parts = self._gather(write, "write the rank's file")
            lanes = {lane: state for part in parts for lane, state in part["lanes"].items()}
            files = dict(part["file"] for part in parts)
            trainer_state = {"format": FORMAT_VERSION, "step": step, **trainer_state}
            self._agree(lambda: self._commit(staging, final, files, lanes, trainer_state), "commit")
        except CheckpointError:
            if self._topology.is_first:  # a full disk needs the room back
                for path in _uncommitted(self._folder):
                    shutil.rmtree(path, ignore_errors=True)
            raise
        self._saved.add(final)
        return final

    def newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest committed checkpoint whose files are what its manifest says.

        A damaged one is passed over with a `report`; None if nothing was ever committed.

        Raises:
            CheckpointError: checkpoints were committed but none is whole.
        """
        candidates = self._topology.gather(committed(self._folder))[0]
        reasons = []
        for folder in reversed(candidates):
            # Ranks share the hashing: each takes every world-th file.
            problems = self._topology.gather(_verify(folder, self._topology.rank, self._topology.world))
            found = [problem for problem in problems if problem]
            if not found:
                return _open(folder)
            self._damaged.add(folder)
            reasons.append(f"{folder.name}: {found[0]}")
            report(f"checkpoint {folder.name} is damaged ({found[0]}); trying the one before")
        if reasons:
            raise CheckpointError(
                "every committed checkpoint is damaged:\n    " + "\n    ".join(reasons),
                where=str(self._folder),
                remedy="restore one from a copy, or start over with resume=never in a new run_dir",
            )
        return None

    def _prepare(self, final: Path, staging: Path) -> None:
        # What this run passed over as damaged must neither stand in for the new
        # checkpoint of its step nor count among those that retention leaves.
        for path in self._damaged | {final}:
            (path / _COMMITTED).unlink(missing_ok=True)
        for leftover in _uncommitted(self._folder):
            shutil.rmtree(leftover)
        staging.mkdir(parents=True)

    def _commit(
        self,
        staging: Path,
        final: Path,
        files: dict[str, Any],
        lanes: dict[int, np.ndarray],
        trainer_state: dict[str, Any],
    ) -> None:
        with (staging / _DATA_STATE).open("wb") as stream:
            np.savez(stream, **{f"lane_{lane:05d}": state for lane, state in sorted(lanes.items())})
        (staging / _TRAINER_STATE).write_text(json.dumps(trainer_state, indent=1))
        files |= dict(_describe(staging / name) for name in (_DATA_STATE, _TRAINER_STATE))
        manifest = json.dumps({"format": FORMAT_VERSION, "files": files}, indent=1).encode()
        _write_synced(staging / _MANIFEST, manifest)
        _sync_folder(staging)
        os.rename(staging, final)
        _sync_folder(self._folder)
        _write_synced(final / _COMMITTED, hashlib.sha256(manifest).hexdigest().encode())
        _sync_folder(final)
        _write_synced(self._folder / _LATEST, final.name.encode())
        for old in committed(self._folder)[: -self._keep]:
            # Without its mark a half-deleted folder is no checkpoint.
            (old / _COMMITTED).unlink()
            shutil.rmtree(old)

    def _agree(self, act: Callable[[], Any], doing: str) -> Any:
        """The first rank acts; all ranks get its result or its error."""
        return self._gather(act if self._topology.is_first else lambda: None, doing)[0]

    def _gather(self, act: Callable[[], Any], doing: str) -> list[Any]:
        """All ranks act; all get every result, or an error if one failed."""
        outcome, failure = None, None
        try:
            outcome = act()
        except Exception as error:
            failure = error
        # A rank that failed for whatever reason takes part, or it would hang the others.
        outcomes, errors = zip(*self._topology.gather((outcome, failure and str(failure))), strict=True)
        if failure and not isinstance(failure, OSError):
            raise failure
        failed = {rank: error for rank, error in enumerate(errors) if error}
        if failed:
            rank, error = next(iter(failed.items()))
            raise CheckpointError(
                f"could not {doing}: {error}",
                where=f"rank {rank}, {self._folder}",
                remedy="free space or mend the file system; earlier checkpoints are untouched",
            )
        return list(outcomes)


def committed(folder: Path) -> list[Path]:
    """Folders of committed checkpoints, oldest first; what is not committed does not count."""
    return sorted(path.parent for path in folder.glob(f"step_*/{_COMMITTED}"))


def _uncommitted(folder: Path) -> list[Path]:
    """What a save that failed or was killed left behind."""
    return [path for path in folder.glob("step_*") if not (path / _COMMITTED).exists()]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify and open one committed checkpoint, on one process.

    Raises:
        CheckpointError: not committed, or a file is not what the manifest says.
    """
    problem = _verify(folder, 0, 1)
    if problem:
        raise CheckpointError(
            f"the checkpoint can't be used: {problem}",
            where=str(folder),
            remedy="name another checkpoint of the run, or restore this one from a copy",
        )
    return _open(folder)


def newest_committed(run_dir: Path) -> Path:
    """Folder of a run's newest committed checkpoint.

    Raises:
        CheckpointError: the run has none.
    """
    folders = committed(run_dir / "checkpoints")
    if not folders:
        raise CheckpointError(
            "the run has no committed checkpoint", where=str(run_dir), remedy="check the path, or train first"
        )
    return folders[-1]


def _open(folder: Path) -> Checkpoint:
    trainer_state = json.loads((folder / _TRAINER_STATE).read_text())
    if trainer_state["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format {trainer_state['format']}, this megablip reads {FORMAT_VERSION}",
            where=str(folder),
            remedy="use the version of megablip that wrote it",
        )
    return Checkpoint(folder, trainer_state)


def _verify(folder: Path, part: int, parts: int) -> str | None:
    """What is wrong with this part of the files, or None."""
    try:
        manifest = (folder / _MANIFEST).read_bytes()
        if hashlib.sha256(manifest).hexdigest() != (folder / _COMMITTED).read_text():
            return f"{_MANIFEST} does not match {_COMMITTED}"
        files = sorted(json.loads(manifest)["files"].items())
        for name, expected in files[part::parts]:
            _, actual = _describe(folder / name, sync=False)
            if actual["size"] != expected["size"]:
                return f"{name} has {actual['size']} bytes instead of {expected['size']}"
            if actual != expected:
                return f"{name} has another SHA-256 than when it was written"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _describe(path: Path, sync: bool = True) -> tuple[str, dict[str, Any]]:
    """(name, size and SHA-256) of a file, synced to disk first."""
    with path.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return path.name, {"size": os.fstat(stream.fileno()).st_size, "sha256": digest}


def _write_synced(path: Path, content: bytes) -> None:
    """The file is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
