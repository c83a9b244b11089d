"""A checkpoint is committed or it does not exist.

    RUN/checkpoints/step_00000500/
        rank_00000.safetensors ...  each rank's slices and random state
        data_state.npz              the state of every lane
        trainer_state.json          step, tokens, hashes, versions
        manifest.json               every file: size and SHA-256
        COMMITTED                   SHA-256 of the manifest; written last
    RUN/checkpoints/latest          name of the newest committed step

Every rank writes its file to `step_N.tmp` and syncs it to disk; when all ranks
know that of each other the first one adds the rest, renames the folder and only
then commits it; `latest` moves after that, old checkpoints go last.  A crash at
any point leaves either the new checkpoint whole or the earlier ones untouched.
Until the commit a small `rank_00000.json` beside each rank's file carries its
size, its hash and the states of the rank's lanes to the first rank, so that
saving needs no collective.

Why not torch.distributed.checkpoint (read and tried as of torch 2.13, 4 ranks):
 -  `async_save` makes collectives in its thread (four a save): on the default
    group it ran into training's and both timed out. Without them (`no_dist`, or
    `use_collectives=False`) all ranks wrote one and the same safetensors file,
    and the save reported success.
 -  a DTensor's offsets follow from the world size. They fit ZeRO-3's pieces, but
    not those of the flat buffers of ZeRO-1 and 2: a piece [2, 5) of 5 elements
    was stored as [3, 6).
 -  its own format unpickles `.metadata`; the safetensors one does not, but has no
    table of files, no hash, no commit, and makes each file in memory a second time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megablip import __version__
from megablip.checkpoint.slices import FileRecord, rank_file
from megablip.config import Config, parse_config, refuse_changes
from megablip.engine.status import RunStatus
from megablip.engine.topology import Topology
from megablip.errors import CheckpointError

FORMAT_VERSION = 2
_MANIFEST, _COMMITTED, _LATEST = "manifest.json", "COMMITTED", "latest"
_DATA_STATE, _TRAINER_STATE = "data_state.npz", "trainer_state.json"
MAX_STATE_BYTES = 1 << 30  # 4096 lanes of eleven sources take 70 MB
_READ_BYTES = 1 << 20  # that are hashed at once


@dataclass(frozen=True)
class Checkpoint:
    """A committed, verified checkpoint."""

    folder: Path
    trainer_state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.trainer_state["step"]

    def lane_states(self) -> dict[int, np.ndarray]:
        """The state of each lane, int64 vectors.

        Raises:
            CheckpointError: they would take more memory than any run's do.
        """
        with np.load(self.folder / _DATA_STATE, allow_pickle=False) as stored:
            size = sum(entry.file_size for entry in stored.zip.infolist())  # no more of it is ever unpacked
            if size > MAX_STATE_BYTES:
                raise CheckpointError(
                    f"{_DATA_STATE} unpacks to {size} bytes, the limit is {MAX_STATE_BYTES}",
                    where=str(self.folder),
                    remedy="this is no checkpoint of megablip's: use another one",
                )
            return {int(name.removeprefix("lane_")): stored[name] for name in stored.files}

    def check(self, config: Config, base: dict[str, str]) -> None:
        """Raises an error if the run that would go on from here is another one.

        Args:
            config: the recipe now.
            base: hashes of "model" and "tokenizer", and the "sampler", of what lies in `model.path` now.

        Raises:
            ConfigError: an identity field changed and `allow_changes` does not name it.
            CheckpointError: so did the model or the tokenizer that the run began with.
        """
        refuse_changes(parse_config(self.trainer_state["config"], where=str(self.folder)), config, str(self.folder))
        began = self.trainer_state["base"]
        if base.get("sampler") != began.get("sampler"):
            raise CheckpointError(
                f"the model's sampler is {base.get('sampler')}, and this run trains {began.get('sampler')}",
                where=f"{config.model.path}, {self.folder}",
                remedy="give the folder the run began with, or start a new run_dir",
            )
        for name, digest in base.items():
            change = "model.path" if name == "model" else name
            if began[name] != digest and change not in config.allow_changes:
                raise CheckpointError(
                    f"the {name} is not the one this run began with",
                    where=f"{config.model.path}, {self.folder}",
                    remedy="give the folder the run began with, start a new run_dir, or name the change: "
                    f"allow_changes=[{change}]",
                )


class CheckpointStore:
    """The checkpoints of one run.

    `newest` and `save` are collectives. What an asynchronous save is made of is
    not: `write` on each rank, then `commit`, or `sweep` after a failure, on the
    first rank alone.

    Args:
        folder: RUN/checkpoints.
        keep: committed checkpoints that retention leaves.
        status: of the run; a superseded attempt neither commits nor deletes. None: nobody else can be there.
    """

    def __init__(self, folder: Path, keep: int, topology: Topology, status: RunStatus | None = None):
        self._folder, self._keep, self._topology, self._status = folder, keep, topology, status
        self._damaged: set[Path] = set()

    def path(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}"

    def _staging(self, step: int) -> Path:
        # What is left of an older attempt may still be writing the same step.
        attempt = self._status and self._status.attempt
        return self.path(step).with_suffix(f".{attempt}.tmp" if attempt else ".tmp")

    def write(
        self, step: int, write_rank_file: Callable[[Path], FileRecord], lane_states: dict[int, np.ndarray]
    ) -> None:
        """Write this rank's part of a checkpoint; on return it is durable, and still no checkpoint.

        Args:
            write_rank_file: writes this rank's slices to the given path, and syncs the file to disk.
            lane_states: of the lanes this rank owns.

        Raises:
            OSError: it can't be written.
        """
        staging = self._staging(step)
        staging.mkdir(parents=True, exist_ok=True)
        name = rank_file(self._topology.rank)
        record = write_rank_file(staging / name)
        lanes = {lane: state.tolist() for lane, state in lane_states.items()}
        part = {"file": (name, record), "lanes": lanes}
        _write_synced(staging / _part_file(self._topology.rank), json.dumps(part).encode())
        _sync_folder(staging)

    def commit(self, step: int, trainer_state: dict[str, Any]) -> None:
        """Make a checkpoint of what all ranks have written: on the first rank, when every `write` has returned.

        Raises:
            OSError: it can't be written; earlier checkpoints are untouched.
            SupersededError: a newer attempt owns the run; nothing is touched.
        """
        self._check_owner()
        final = self.path(step)
        staging = self._staging(step)
        # What this run passed over as damaged must neither stand in for the new
        # checkpoint of its step nor count among those that retention leaves.
        for path in self._damaged | {final}:
            (path / _COMMITTED).unlink(missing_ok=True)
            if path.exists():
                shutil.rmtree(path)
        parts = [staging / _part_file(rank) for rank in range(self._topology.world)]
        files, lanes = {}, {}
        for path in parts:
            part = json.loads(path.read_bytes())
            files |= [part["file"]]
            lanes |= {f"lane_{int(lane):05d}": np.array(state, np.int64) for lane, state in part["lanes"].items()}
        with (staging / _DATA_STATE).open("wb") as stream:
            np.savez_compressed(stream, **dict(sorted(lanes.items())))  # a fifth of the bytes
        trainer_state = {"format": FORMAT_VERSION, "step": step, "versions": _versions()} | trainer_state
        (staging / _TRAINER_STATE).write_text(json.dumps(trainer_state, indent=1))
        files |= {name: _described(staging / name) for name in (_DATA_STATE, _TRAINER_STATE)}
        manifest = json.dumps({"format": FORMAT_VERSION, "files": files}, indent=1).encode()
        _write_synced(staging / _MANIFEST, manifest)
        for path in parts:
            path.unlink()
        _sync_folder(staging)
        self._check_owner()  # once more: hashing and syncing take their time
        os.rename(staging, final)
        _sync_folder(self._folder)
        _write_synced(final / _COMMITTED, hashlib.sha256(manifest).hexdigest().encode())
        _sync_folder(final)
        _write_synced(self._folder / _LATEST, final.name.encode())
        _sync_folder(self._folder)
        for old in committed(self._folder)[: -self._keep]:
            # Without its mark a half-deleted folder is no checkpoint.
            (old / _COMMITTED).unlink()
            shutil.rmtree(old)

    def _check_owner(self) -> None:
        if self._status:
            self._status.check_owner()

    def sweep(self) -> None:
        """Delete what saves that failed or were killed have left: on the first rank, while no rank writes."""
        if self._status and self._status.superseded_by:
            return
        for path in self._folder.glob("step_*"):
            if not (path / _COMMITTED).exists():
                shutil.rmtree(path, ignore_errors=True)

    def save(
        self,
        step: int,
        write_rank_file: Callable[[Path], FileRecord],
        lane_states: dict[int, np.ndarray],
        trainer_state: dict[str, Any],
    ) -> Path:
        """Write and commit a checkpoint at once; all ranks wait. See `write` and `commit`.

        Raises:
            CheckpointError: on all ranks, if any could not write; earlier
                checkpoints are untouched.
        """
        first = self._topology.is_first
        try:
            self._agree(self.sweep if first else lambda: None)
            self._agree(lambda: self.write(step, write_rank_file, lane_states))
            self._agree(lambda: self.commit(step, trainer_state) if first else None)
        except CheckpointError:
            if first:
                self.sweep()
            raise
        return self.path(step)

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

    def agree(self, failure: Exception | None) -> None:
        """Compare how something went on all ranks (a collective).

        Raises:
            CheckpointError: on all ranks, if any could not write.
            Exception: `failure` itself on its own rank, if it is not the file system's.
        """
        errors = self._topology.gather(failure and f"{type(failure).__name__}: {failure}")
        if failure and not isinstance(failure, OSError):
            raise failure
        failed = {rank: error for rank, error in enumerate(errors) if error}
        if failed:
            rank, error = next(iter(failed.items()))
            raise CheckpointError(
                f"the checkpoint could not be written: {error}",
                where=f"rank {rank}, {self._folder}",
                remedy="free space or mend the file system; earlier checkpoints are untouched",
            )

    def _agree(self, act: Callable[[], None]) -> None:
        """All ranks act; an error of one is everyone's."""
        failure = None
        try:
            act()
        except Exception as error:
            failure = error
        # A rank that failed for whatever reason takes part, or it would hang the others.
        self.agree(failure)


def committed(folder: Path) -> list[Path]:
    """Folders of committed checkpoints, oldest first; what is not committed does not count."""
    return sorted(path.parent for path in folder.glob(f"step_*/{_COMMITTED}"))


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


def manifest_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's files with their sizes and hashes, and its trainer state; nothing is verified.

    Raises:
        CheckpointError: one of the two can't be read.
    """
    try:
        return json.loads((folder / _MANIFEST).read_text())["files"], json.loads((folder / _TRAINER_STATE).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the manifest can't be read: {error}", where=str(folder)) from None


def config_of(folder: Path) -> Config:
    """The recipe that a checkpoint was made with; nothing else of it is read or verified.

    Raises:
        CheckpointError: its file is damaged.
    """
    try:
        raw = json.loads((folder / _TRAINER_STATE).read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the recipe can't be read: {error}", where=str(folder / _TRAINER_STATE)) from None
    return parse_config(raw, where=str(folder))


def _open(folder: Path) -> Checkpoint:
    trainer_state = json.loads((folder / _TRAINER_STATE).read_text())
    if trainer_state["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format {trainer_state['format']}, this megablip reads {FORMAT_VERSION}",
            where=str(folder),
            remedy="use the version of megablip that wrote it",
        )
    return Checkpoint(folder, trainer_state)


def problems(folder: Path, part: int = 0, parts: int = 1, *, weights_only: bool = False) -> Iterator[str]:
    """What is wrong with every parts-th file of a checkpoint, as the manifest tells; nothing if it is whole.

    Args:
        weights_only: of the ranks' files look at the part with the weights, a third, and at the size.
    """
    try:
        manifest = (folder / _MANIFEST).read_bytes()
        if hashlib.sha256(manifest).hexdigest().encode() != (folder / _COMMITTED).read_bytes():
            yield f"{_MANIFEST} does not match {_COMMITTED}"
        files = sorted(json.loads(manifest)["files"].items())
    except (OSError, ValueError, KeyError) as error:
        yield f"{type(error).__name__}: {error}"
        return
    for name, expected in files[part::parts]:
        try:
            length, digest = expected["size"], expected["sha256"]
            size = (folder / name).stat().st_size
            if weights_only and "weights" in expected:
                length, digest = expected["weights"]["bytes"], expected["weights"]["sha256"]
            if size != expected["size"]:
                yield f"{name} has {size} bytes instead of {expected['size']}"
            elif _sha256(folder / name, length) != digest:
                yield f"{name} has another SHA-256 than when it was written"
        except (OSError, KeyError, TypeError) as error:
            yield f"{type(error).__name__}: {error}"


def _verify(folder: Path, part: int, parts: int) -> str | None:
    """The first problem, or None."""
    return next(problems(folder, part, parts), None)


def _part_file(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def _versions() -> dict[str, str]:
    """Of all that the numbers of a checkpoint may depend on."""
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"python": platform.python_version(), "megablip": __version__} | packages


def _described(path: Path) -> FileRecord:
    """A file, synced to disk first."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    size = path.stat().st_size
    return {"size": size, "sha256": _sha256(path, size)}


def _sha256(path: Path, length: int) -> str:
    """Of the first `length` bytes of a file."""
    digest, left = hashlib.sha256(), length
    with path.open("rb", buffering=0) as stream:
        while left and (data := stream.read(min(left, _READ_BYTES))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


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
