"""What the ranks of test_scale.py do: gradients of any split, against plain autograd on one process.

The gradient that an engine stepped on is read from where it must have arrived:
after one step from zero moments, exp_avg is (1 - beta1) times it, clipped.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist

from megablip.config import EngineConfig, OptimizerConfig
from megablip.data.collate import collate
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.optimizer import decays, part_of
from megablip.engine.topology import Topology
from megablip.engine.zero import ZeroEngine
from megablip.model import loss
from megablip.model.blip3 import Blip3ForConditionalGeneration
from megablip.model.vision import encode_tiles
from megablip.records import IGNORE_LABEL, MASTER, LocalSlice, MicroBatch
from tests.distributed.matrix import Toy
from tests.distributed.matrix import initial as toy_initial
from tests.model.tiny import Doc, make_doc, pack, tiny_config, tiny_model

BETA1, BETA2 = 0.9, 0.95
OPTIMIZER = OptimizerConfig(lr=1.0, betas=(BETA1, BETA2), weight_decay=0.1)
RATES = {"decoder": 0.1, "sampler": 0.05, "tower": 0.02}
NEVER_CLIPS, CLIPS = 1e9, 0.01

SEQUENCES = 4
PATTERNS = [[bool(number >> bit & 1) for bit in range(SEQUENCES)] for number in range(2**SEQUENCES)]
"""Which of four sequences hold images."""


@functools.cache
def reference(tied: bool = False) -> Blip3ForConditionalGeneration:
    """The model as it begins, whole, tower trained. A frozen tower has the same weights."""
    return tiny_model(train_tower=True, tied=tied)


def make_engine(
    topology: Topology,
    ds_config: str,
    train_tower: bool,
    micro_batches: int,
    clip_norm: float,
    checkpointing: bool = False,
    tied: bool = False,
) -> ZeroEngine:
    def build() -> Blip3ForConditionalGeneration:
        config = tiny_config(tied=tied)
        model = Blip3ForConditionalGeneration(config, with_vision_tower=train_tower, train_tower=train_tower)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model

    completed = complete_ds_config(
        EngineConfig(ds_config=ds_config, precision="fp32"), clip_norm, micro_batches, topology
    )
    if ds_config == "zero3":
        completed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return ZeroEngine(build, completed, OPTIMIZER, topology)


def initial(name: str, kind: str, shape: tuple[int, ...], start: int, end: int, tied: bool = False) -> torch.Tensor:
    return reference(tied).get_parameter(name).detach().flatten()[start:end]


def expected_step(
    batches: list[MicroBatch], train_tower: bool, clip_norm: float, tied: bool = False
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and clipped gradient of the global batch, by autograd."""
    model = reference(tied)
    model.zero_grad()
    valid, loss = sum(batch.valid_labels for batch in batches), 0.0
    for batch in batches:
        total = model(packed=batch).loss / valid
        total.backward()
        loss += float(total.detach())
    gradient = {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if train_tower or not name.startswith("vision_tower.")
    }
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in gradient.values()))
    return loss, norm, {name: grad * min(1.0, clip_norm / norm) for name, grad in gradient.items()}


def compare_step(
    topology: Topology,
    engine: ZeroEngine,
    train_tower: bool,
    mine: list[MicroBatch],
    valid_labels: int,
    expected: tuple[float, float, dict[str, torch.Tensor]],
    tied: bool = False,
) -> dict[str, Any]:
    """One step of the engine from the start, as the trainer does it; the largest relative differences."""
    engine.load(functools.partial(initial, tied=tied), moments=False)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in mine:
        features = None if train_tower else encode_tiles(reference(tied).vision_tower, batch.tiles)
        losses = engine(packed=batch, vision_features=features)
        engine.backward(losses.loss * (topology.world / valid_labels))
        engine.step(RATES)
        loss += losses.document_loss.double().sum()
    dist.all_reduce(loss)
    expected_loss, norm, gradient = expected
    largest = max(float(grad.abs().max()) for grad in gradient.values())
    errors, updates = {}, {}
    for piece in engine.local_slices():
        found = piece.tensors["exp_avg"].double() / (1 - BETA1)
        # A softmax does not change when all its scores move by the same amount: the
        # true gradient of a bias of keys is zero, and what is there is rounding.
        least = largest if piece.name.endswith("k_proj.bias") else 0.0
        errors[piece.name] = relative_error(found, gradient[piece.name], piece, least)
        updates[piece.name] = update_error(piece, found, tied)
    worst = max(errors, key=errors.get)
    return {
        "loss": abs(float(loss) / valid_labels / expected_loss - 1),
        "norm": abs(engine.grad_norm / norm - 1),
        "gradient": errors[worst],
        "worst": worst,
        "update": max(updates.values()),
        "not_here": sorted(set(gradient) - set(errors)),
        "applied": engine.was_step_applied,
    }


def relative_error(found: torch.Tensor, whole: torch.Tensor, piece: LocalSlice, least_scale: float = 0.0) -> float:
    """Largest difference of a slice from its place in `whole`, over the largest value of `whole`."""
    difference = (found - whole.flatten()[piece.start : piece.end]).abs().max().item() if len(found) else 0.0
    scale = max(float(whole.abs().max()), least_scale)
    return difference / scale if scale else math.inf if difference else 0.0


def update_error(piece: LocalSlice, gradient: torch.Tensor, tied: bool) -> float:
    """How far the masters are from AdamW's first step with their part's rate and decay, over the rate."""
    if piece.end == piece.start:
        return 0.0
    before = initial(piece.name, MASTER, piece.shape, piece.start, piece.end, tied).double()
    rate = RATES[part_of(piece.name)]
    decay = OPTIMIZER.weight_decay if decays(piece.name, piece.shape) else 0.0
    scale = (piece.tensors["exp_avg_sq"].double() / (1 - BETA2)).sqrt() + OPTIMIZER.eps
    expected = before * (1 - rate * decay) - rate * gradient / scale
    return float((piece.tensors[MASTER].double() - expected).abs().max()) / rate


def share(batches: list[MicroBatch], topology: Topology) -> list[MicroBatch]:
    """This rank's, filled up with dummies so that all ranks have as many."""
    each = math.ceil(len(batches) / topology.world)
    mine = batches[topology.rank * each : (topology.rank + 1) * each]
    return mine + [collate([], tiny_config().layout)] * (each - len(mine))


def sequence(number: int, with_images: bool) -> list[Doc]:
    """Two documents; numbers of labels and tiles differ from sequence to sequence."""
    grids = [[(2, 1)], [(1, 2), (2, 2)], [(1, 2)], [(2, 2)]][number] if with_images else []
    return [make_doc(9 + 4 * number, grids, seed=10 + number), make_doc(7, [], seed=20 + number)]


def image_patterns(topology: Topology, cells: list[tuple[str, bool, bool]]) -> list[dict[str, Any]]:
    """Each pattern of sequences with and without images.

    Args:
        cells: (ds_config, train_tower, activation checkpointing). One engine
            for all patterns of a cell, those with images and those without in
            turn, so that a gradient left from the step before would show.
    """
    order = [PATTERNS[number // 2 if number % 2 else -1 - number // 2] for number in range(len(PATTERNS))]
    found = []
    for ds_config, train_tower, checkpointing in cells:
        engine = make_engine(topology, ds_config, train_tower, SEQUENCES // topology.world, CLIPS, checkpointing)
        for pattern in order:
            batches = [pack(sequence(number, images)) for number, images in enumerate(pattern)]
            found.append(
                compare_step(
                    topology,
                    engine,
                    train_tower,
                    share(batches, topology),
                    sum(batch.valid_labels for batch in batches),
                    expected_step(batches, train_tower, CLIPS),
                )
                | {"cell": [topology.world, ds_config, train_tower, checkpointing, pattern]}
            )
    return found


def document_splits(topology: Topology, cells: list[tuple[str, bool, float, int]]) -> list[dict[str, Any]]:
    """The same 64 documents in more or fewer micro-batches.

    Args:
        cells: (ds_config, train_tower, clip_norm, micro-batches of all ranks).
            Ranks that get none run dummies.
    """
    documents = [
        make_doc(5 + number % 13, [(1 + number % 2, 2 - number % 2)] * (number % 3 == 0), seed=100 + number)
        for number in range(64)
    ]
    found = []
    for ds_config, train_tower, clip_norm, count in cells:
        size = len(documents) // count
        batches = [pack(documents[start : start + size]) for start in range(0, len(documents), size)]
        mine = share(batches, topology)
        engine = make_engine(topology, ds_config, train_tower, len(mine), clip_norm)
        expected = expected_step([pack([document]) for document in documents], train_tower, clip_norm)
        valid = sum(batch.valid_labels for batch in batches)
        found.append(
            compare_step(topology, engine, train_tower, mine, valid, expected)
            | {"cell": [topology.world, ds_config, train_tower, clip_norm, count]}
        )
    return found


def tied_embeddings(topology: Topology, cells: list[str]) -> list[dict[str, Any]]:
    """A decoder whose output head is its embeddings.

    Args:
        cells: ds_config of each.
    """
    batches = [pack(sequence(number, number % 2 == 0)) for number in range(SEQUENCES)]
    valid = sum(batch.valid_labels for batch in batches)
    found = []
    for ds_config in cells:
        engine = make_engine(topology, ds_config, False, SEQUENCES // topology.world, NEVER_CLIPS, tied=True)
        expected = expected_step(batches, False, NEVER_CLIPS, tied=True)
        step = compare_step(topology, engine, False, share(batches, topology), valid, expected, tied=True)
        found.append(step | {"cell": [topology.world, ds_config]})
    return found


def label_counts(topology: Topology, cells: list[list[int]]) -> list[dict[str, Any]]:
    """Under ZeRO-3, ranks whose head takes different numbers of chunks, or none.

    Args:
        cells: for each rank of two, how many rows of its micro-batch keep their label.
    """
    chunk_rows, loss._chunk_rows = loss._chunk_rows, lambda weight: 8
    engine = make_engine(topology, "zero3", False, 1, NEVER_CLIPS)
    found = []
    for counts in cells:
        batches = [pack([make_doc(150, [(2, 1)], seed=30 + number)]) for number in range(topology.world)]
        for batch, count in zip(batches, counts, strict=True):
            batch.labels[(batch.labels != IGNORE_LABEL).nonzero().flatten()[count:]] = IGNORE_LABEL
            assert batch.valid_labels == count
        valid, expected = sum(counts), expected_step(batches, False, NEVER_CLIPS)
        step = compare_step(topology, engine, False, share(batches, topology), valid, expected)
        found.append(step | {"cell": counts})
    loss._chunk_rows = chunk_rows
    return found


def toy_gradients(topology: Topology, cells: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A parameter that some of 16 micro-batches don't use, against autograd.

    Args:
        cells: (ds_config, precision).

    Returns:
        `spare`: the largest relative difference of its gradient, by whether the first
        and the second half of the micro-batches use it; `all`: that of all gradients.
    """
    found = []
    for ds_config, precision in cells:
        config = EngineConfig(ds_config=ds_config, precision=precision)
        engine = ZeroEngine(Toy, complete_ds_config(config, NEVER_CLIPS, 16, topology), OPTIMIZER, topology)
        everything = toy_error(engine, precision, [True] * 16, "")
        spare = {
            str(halves): toy_error(engine, precision, [halves[0]] * 8 + [halves[1]] * 8, "spare")
            for halves in ([False, False], [True, False], [False, True])
        }
        found.append({"cell": [topology.world, ds_config, precision], "spare": spare, "all": everything})
    return found


def toy_error(engine: ZeroEngine, precision: str, uses: list[bool], prefix: str) -> float:
    """Largest relative difference of a step's gradients from the sum, in float32, of each micro-batch's.

    Every rank sees the same data, so that the mean over ranks rounds nothing.

    Args:
        uses: whether `spare` is used, for each micro-batch.
        prefix: of the parameters that are compared.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    plain = Toy().to(dtype)
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(toy_initial(name, MASTER, parameter.shape, 0, parameter.numel()).view(parameter.shape))
    expected = {name: torch.zeros(parameter.shape) for name, parameter in plain.named_parameters()}
    engine.load(toy_initial, moments=False)
    for number, use_spare in enumerate(uses):
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(number)).to(dtype)
        plain.zero_grad()
        plain(x, use_spare).backward()
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad.float()
        engine.backward(engine(x, use_spare=use_spare))
        engine.step(RATES)
    return max(
        (
            relative_error(piece.tensors["exp_avg"] / (1 - BETA1), expected[piece.name], piece)
            for piece in engine.local_slices()
            if piece.name.startswith(prefix)
        ),
        default=0.0,
    )


def run_all(topology: Topology, cells: dict[str, list[Any]]) -> dict[str, list[dict[str, Any]]]:
    """Several of the functions above in one set of ranks: starting them takes longer than most cells."""
    return {name: globals()[name](topology, chosen) for name, chosen in cells.items()}
