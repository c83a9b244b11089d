"""DeepSpeed's own ZeRO checkpoints, as DeepSpeed 0.19 and earlier versions write them, without DeepSpeed.

    FOLDER/latest                                       names TAG
    FOLDER/TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt    masters and moments of rank R
    FOLDER/TAG/mp_rank_00_model_states.pt               ZeRO-1, 2: shapes, buffers, frozen parameters
    FOLDER/TAG/zero_pp_rank_R_mp_rank_00_model_states.pt    ZeRO-3: the same, frozen ones cut up

Masters are flat vectors, one for each parameter group (ZeRO-1, 2) or sub-group
(ZeRO-3), with no names in them: `param_shapes` tells the order.
 -  ZeRO-1, 2: the parameters of a group end to end (with `parameter_alignment`
    padding after each), then padding, cut into equal parts; rank R has the R-th.
    Its master is stored without the last padding, its moments with it.
 -  ZeRO-3: each parameter of n elements in parts of ceil(n / world), the last ones
    padded; rank R has the R-th of each, end to end.

Sources: deepspeed/runtime/zero/stage_1_and_2.py and stage3.py (state_dict),
runtime/bf16_optimizer.py, runtime/engine.py (_get_zero_param_shapes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megablip.checkpoint.deepspeed_state import (
    DAMAGED,
    Fragment,
    ModelStates,
    Shape,
    TrainingState,
    mixed_steps,
    required,
    scalar,
    settings_of_groups,
)
from megablip.checkpoint.deepspeed_universal import OPTIMIZER_STATE, read_universal
from megablip.checkpoint.restricted import Stub, TensorRef, TorchFile
from megablip.errors import CheckpointError
from megablip.records import MASTER, MOMENTS

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_LATEST = ("latest", "latest_universal")


def is_deepspeed(source: Path) -> bool:
    """Whether a folder is, or by its `latest` leads to, a checkpoint that DeepSpeed saved."""
    is_ours = any(source.glob("step_*/COMMITTED"))  # its folder has a `latest`, too
    return _is_tag(source) or (any((source / name).is_file() for name in _LATEST) and not is_ours)


def tag_folder(source: Path) -> Path:
    """The folder with the files: `source` itself, or the one that its `latest` names.

    Raises:
        CheckpointError: it leads to no such files.
    """
    if _is_tag(source):
        return source
    tag = ""
    for name in reversed(_LATEST):
        with suppress(OSError, UnicodeDecodeError):
            tag = (source / name).read_text().strip()
    folder = source / tag
    if not tag or Path(tag).name != tag or not _is_tag(folder):
        raise CheckpointError(
            f"the folder holds no ZeRO checkpoint of DeepSpeed{f' called {tag[:100]!r}' if tag else ''}",
            where=str(source),
            remedy="give the folder with the *_optim_states.pt files, or the one with `latest` beside it",
        )
    return folder


def read_zero(source: Path) -> TrainingState:
    """Read a ZeRO-1, 2 or 3 checkpoint, or one in universal format; its tensors stay on disk.

    Raises:
        CheckpointError: no such checkpoint, a rank's file is missing, damaged or of
            another run, or what it holds can't be used here.
    """
    folder = tag_folder(source)
    return read_universal(folder) if (folder / OPTIMIZER_STATE).is_file() else _ZeroFiles(folder).state()


def _is_tag(folder: Path) -> bool:
    return any(folder.glob("*_optim_states.pt")) or (folder / OPTIMIZER_STATE).is_file()


class _ZeroFiles:
    """The files of one tag, on the way to a TrainingState."""

    def __init__(self, folder: Path):
        self.folder = folder
        optim = self._rank_files()
        self.world = len(optim)
        self.optim = [TorchFile(path) for path in optim]
        self.states = [required(file, file.content, "optimizer_state_dict", dict) for file in self.optim]
        stage = self.states[0].get("zero_stage", 1)  # BF16_Optimizer, ZeRO-1 in bf16, doesn't say
        self.stage = stage.arguments[0] if isinstance(stage, Stub) and stage.arguments else stage
        if self.stage not in (1, 2, 3):
            raise self._error(f"the checkpoint says that it is of ZeRO stage {self.stage}", "1, 2 and 3 are read")
        self._check_world(optim)
        self.models = ModelStates(self._model_files(), partitioned=self.stage == 3)

    def state(self) -> TrainingState:
        models = self.models
        param_groups = required(self.optim[0], self._inner(0), "param_groups", list)
        groups, group_of = settings_of_groups(param_groups, models.groups)
        return TrainingState(
            folder=self.folder,
            title=f"DeepSpeed {models.version}, ZeRO-{self.stage}, {self.world} ranks",
            step=models.step,
            adam_step=self._adam_step(),
            shapes=models.shapes,
            ranks=self._partitioned(models.groups) if self.stage == 3 else self._flat_groups(models.groups),
            frozen=models.frozen(),
            buffers=models.buffers,
            shared=models.shared,
            groups=groups,
            group_of=group_of,
        )

    def _rank_files(self) -> list[Path]:
        found: dict[int, Path] = {}
        for path in self.folder.glob("*_optim_states.pt"):
            match = _OPTIM.fullmatch(path.name)
            if match is None or int(match[2]):
                raise self._error(
                    f"{path.name} belongs to a run with experts, or with tensor or pipeline parallelism",
                    "only data parallelism (ZeRO) is read",
                )
            if int(match[1]) in found:
                raise self._error(
                    f"{path.name} and {found[int(match[1])].name} are of one rank: files of two checkpoints are mixed",
                    "remove those of the other checkpoint",
                )
            found[int(match[1])] = path
        if not found:
            raise self._error("there are no files *_optim_states.pt", "give the folder that has them")
        missing = sorted(set(range(max(found) + 1)) - found.keys())
        if missing:
            raise self._missing(missing)
        return [found[rank] for rank in sorted(found)]

    def _check_world(self, paths: list[Path]) -> None:
        for state, path in zip(self.states, paths, strict=True):
            count = state.get("partition_count")
            count = max(count, default=0) if isinstance(count, list) else count
            if not isinstance(count, int) or count < 1:
                raise self._error(f"{path.name} does not tell the number of ranks", DAMAGED)
            if count > self.world:
                raise self._missing(list(range(self.world, count)))
            if count < self.world:
                raise self._error(
                    f"{path.name} is of a run of {count} ranks, but there are files of {self.world}",
                    "remove the files of the other checkpoint",
                )
            if state.get("zero_stage", 1) != self.states[0].get("zero_stage", 1):
                raise self._error(
                    f"{path.name} is of another ZeRO stage than that of rank 0", "use files of one checkpoint"
                )
            if state.get("ds_zero_partition_groups"):
                raise self._error("experts are partitioned among some of the ranks (AutoEP)", "that is not read")

    def _model_files(self) -> list[Path]:
        if self.stage != 3:
            paths = [self.folder / "mp_rank_00_model_states.pt"]
        else:
            paths = [self.folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(self.world)]
        for path in paths:
            if not path.exists():
                raise self._error(f"{path.name} is missing", "copy it from where the checkpoint was made")
        return paths

    def _flat_groups(self, shapes: list[dict[str, Shape]]) -> list[list[Fragment]]:
        """ZeRO-1, 2."""
        masters = [required(f, s, "single_partition_of_fp32_groups", list) for f, s in self._ranks()]
        paddings = self.states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        ranks: list[list[Fragment]] = [[] for _ in range(self.world)]
        for number, group in enumerate(shapes):
            flats = [self._vectors(rank, masters[rank], number) for rank in range(self.world)]
            width = max(flat[MASTER].numel for flat in flats)  # the last rank's lacks the padding
            end = 0
            for (name, shape), padding in zip(group.items(), paddings[number], strict=True):
                begin, end = end, end + math.prod(shape)
                for rank in range(begin // max(width, 1), self.world):
                    low, high = max(begin, rank * width), min(end, (rank + 1) * width)
                    if low >= high:
                        break
                    places = {kind: (flat, low - rank * width) for kind, flat in flats[rank].items()}
                    ranks[rank].append(Fragment(name, low - begin, high - begin, places))
                end += padding
            if end > width * self.world:
                raise self._another_shape(number, end, width * self.world)
        for rank, fragments in enumerate(ranks):
            self._check_mapping(rank, fragments)
            self._check_extents(rank, fragments)
        return ranks

    def _partitioned(self, shapes: list[dict[str, Shape]]) -> list[list[Fragment]]:
        """ZeRO-3."""
        ranks = []
        for rank, (file, state) in enumerate(self._ranks()):
            masters = required(file, state, "fp32_flat_groups", list)
            fragments = []
            for number, group in enumerate(shapes):
                flats, first = self._vectors(rank, masters, number), 0
                for name, shape in group.items():
                    numel = math.prod(shape)
                    width = -(-numel // self.world)
                    start, end = min(rank * width, numel), min((rank + 1) * width, numel)
                    places = {kind: (flat, first) for kind, flat in flats.items()}
                    fragments.append(Fragment(name, start, end, places))
                    first += width
                if first != flats[MASTER].numel:
                    raise self._another_shape(number, first, flats[MASTER].numel)
            self._check_extents(rank, fragments)
            ranks.append([fragment for fragment in fragments if fragment.end > fragment.start])
        return ranks

    def _vectors(self, rank: int, masters: list[Any], number: int) -> dict[str, TensorRef]:
        """Master and moments of one group, or sub-group, of a rank."""
        file = self.optim[rank]
        moments = self._inner(rank).get("state", {}).get(number, {})
        found = {MASTER: masters[number] if number < len(masters) else None}
        found |= {kind: moments.get(kind) for kind in MOMENTS}
        for kind, value in found.items():
            if not isinstance(value, TensorRef) or not value.dtype.is_floating_point:
                raise CheckpointError(
                    f"there is no {kind} of parameter group {number}",
                    where=str(file.path),
                    remedy="the optimizer must be Adam, have made a step, and keep its state in the file (not on NVMe)",
                )
        return found

    def _inner(self, rank: int) -> dict[str, Any]:
        """The state dict of the optimizer inside DeepSpeed's."""
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        return required(self.optim[rank], self.states[rank], key, dict)

    def _adam_step(self) -> int:
        steps = {}
        for rank, file in enumerate(self.optim):
            inner = self._inner(rank)
            for source in (*inner.get("state", {}).values(), *inner.get("param_groups", [])):
                if isinstance(source, dict) and "step" in source:
                    steps.setdefault(scalar(source["step"]), file.path.name)
        if len(steps) > 1:
            (one, its), (other, name) = list(steps.items())[:2]
            raise mixed_steps(self.folder, f"{name} has made {other:g} updates, {its} {one:g}")
        if not steps:
            raise self._error("the optimizer's step is not in the files", "only Adam's state is read")
        return int(next(iter(steps)))

    def _check_mapping(self, rank: int, fragments: list[Fragment]) -> None:
        """DeepSpeed's own account of a rank's vectors must agree with what `param_shapes` tells."""
        mapping = self.states[rank].get("param_slice_mappings")
        zero = self.models.ds_config.get("zero_optimization") or {}
        if not mapping or zero.get("round_robin_gradients"):  # with that, DeepSpeed's account is wrong (0.19.8)
            return
        told = {
            name: (address.attributes.get("start"), address.attributes.get("numel"))
            for group in mapping
            for name, address in group.items()
            if isinstance(address, Stub)
        }
        for fragment in fragments:
            mine = (fragment.places[MASTER][1], fragment.end - fragment.start)
            if told.get(fragment.name) != mine:
                raise self._error(
                    f"{fragment.name} should begin at {mine[0]} and have {mine[1]} elements in "
                    f"{self.optim[rank].path.name}, which says {told.get(fragment.name)}",
                    "the model states and the optimizer states are not of one run: use files of one checkpoint",
                )

    def _check_extents(self, rank: int, fragments: list[Fragment]) -> None:
        for fragment in fragments:
            for kind, (stored, first) in fragment.places.items():
                if first + fragment.end - fragment.start > stored.numel:
                    raise CheckpointError(
                        f"the {kind} of {fragment.name} is not whole: its vector has {stored.numel} elements",
                        where=str(self.optim[rank].path),
                        remedy=DAMAGED,
                    )

    def _ranks(self) -> Iterator[tuple[TorchFile, dict[str, Any]]]:
        yield from zip(self.optim, self.states, strict=True)

    def _another_shape(self, number: int, wanted: int, found: int) -> CheckpointError:
        return self._error(
            f"the parameters of group {number} need {wanted} elements, but its vectors have {found}",
            "the model states and the optimizer states are not of one run: use files of one checkpoint",
        )

    def _missing(self, ranks: list[int]) -> CheckpointError:
        return self._error(
            f"the optimizer states of rank {', '.join(map(str, ranks))} are missing",
            "copy the files of all ranks into the folder; each node may have kept its own",
        )

    def _error(self, what: str, remedy: str) -> CheckpointError:
        return CheckpointError(what, where=str(self.folder), remedy=remedy)
