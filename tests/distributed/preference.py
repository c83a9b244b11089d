"""What the ranks of test_preference.py do: steps of DPO with adapters, at any world size."""

from __future__ import annotations

import math
from typing import Any

import torch

from megablip.config import EngineConfig, LoraConfig, OptimizerConfig, PreferenceConfig
from megablip.data.collate import collate
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.objective import PreferenceObjective
from megablip.engine.topology import Topology
from megablip.engine.zero import ZeroEngine
from megablip.model.blip3 import Blip3ForConditionalGeneration
from megablip.model.lora import add_lora, base_name, initial_adapter
from megablip.model.preference import Answers, preference_loss
from megablip.model.vision import encode_tiles
from megablip.records import MASTER, MicroBatch
from tests.model.tiny import make_doc, pack, tiny_config, tiny_model

LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)
PREFERENCE = PreferenceConfig(beta=0.3, sft_weight=0.2)
OPTIMIZER = OptimizerConfig(lr=0.02, weight_decay=0.0)
MICRO_BATCHES, STEPS = 4, 3  # of all ranks


def batches() -> list[MicroBatch]:
    """One, two or no pairs, with and without images."""
    made = []
    for number in range(MICRO_BATCHES):
        pairs = [1, 2, 0, 1][number]
        documents = []
        for pair in range(pairs):
            grids = [(2, 1)] if (number + pair) % 2 else []
            documents += [make_doc(9 + answer, grids, seed=10 * number + 2 * pair + answer) for answer in range(2)]
        if documents:
            batch = pack(documents)
            batch.pair = torch.arange(pairs, dtype=torch.int32).repeat_interleave(2)
        else:
            batch = collate([], tiny_config().layout)
        made.append(batch)
    return made


def with_adapters(model: Blip3ForConditionalGeneration) -> Blip3ForConditionalGeneration:
    add_lora(model, LORA)
    return model


def first(name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
    values = initial_adapter(name, shape, seed=0)
    if values is None:
        values = tiny_model().get_parameter(base_name(name)).detach()
    elif ".lora_B." in name:
        values = values + 0.1  # not zero, so that policy and reference differ from the start
    return values.flatten()[start:end]


def reference() -> dict[str, Any]:
    """The same steps by autograd, the reference's answers from a second model without adapters."""
    model, base = with_adapters(tiny_model()), tiny_model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        p.data.copy_(first(name, MASTER, tuple(p.shape), 0, p.numel()).view(p.shape))
    adamw = torch.optim.AdamW(
        trained.values(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.0
    )
    losses = []
    for _ in range(STEPS):
        adamw.zero_grad()
        pairs, total = sum(batch.pairs for batch in batches()), 0.0
        for batch in batches():
            if not batch.pairs:
                continue
            with torch.no_grad():
                kept = base(packed=batch)
            found = model(packed=batch, by_document=True)
            policy, start = (Answers.of(x.document_loss, x.document_labels, batch.pair) for x in (found, kept))
            loss = preference_loss(policy, start, PREFERENCE).loss / pairs
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER.clip_norm)
        adamw.step()
        losses.append(total)
    return {"losses": losses, "weights": {name: p.detach().flatten().tolist() for name, p in trained.items()}}


def run(topology: Topology, strategy: str, checkpointing: bool) -> dict[str, Any]:
    def build() -> Blip3ForConditionalGeneration:
        model = with_adapters(Blip3ForConditionalGeneration(tiny_config(), with_vision_tower=False))
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model

    mine = batches()[topology.rank :: topology.world]
    engine_config = EngineConfig(ds_config=strategy, precision="fp32")
    completed = complete_ds_config(engine_config, OPTIMIZER.clip_norm, len(mine), topology)
    if strategy == "zero3":
        completed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = ZeroEngine(build, completed, OPTIMIZER, topology)
    engine.load(first, moments=False)
    tower = tiny_model().vision_tower
    objective = PreferenceObjective(PREFERENCE)
    pairs, losses = sum(batch.pairs for batch in batches()), []
    for _ in range(STEPS):
        total = 0.0
        for batch in mine:
            found, sums = objective(engine, batch, encode_tiles(tower, batch.tiles))
            assert len(sums) == len(objective.sums)
            assert bool(sums[-1] > 0) == bool(batch.pairs), "adapters that do something are a distance from the base"
            engine.backward(found.loss * (topology.world / pairs))
            engine.step({"decoder": OPTIMIZER.lr})
            total += float(found.loss.detach()) / pairs
        losses.append(sum(topology.gather(total)))
    slices = {f"{s.name}|{s.start}": s.tensors[MASTER].tolist() for s in engine.local_slices()}
    frozen = all(
        torch.equal(weight, first(name, MASTER, tuple(weight.shape), 0, weight.numel()).view(weight.shape))
        for name, weight in engine.gathered()
        if ".lora_" not in name
    )
    return {"losses": losses, "slices": slices, "frozen": frozen, "finite": all(map(math.isfinite, losses))}
