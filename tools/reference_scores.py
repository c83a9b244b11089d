"""What the reference says of the pairs of a preference stage, computed once and kept beside their shards.

    python -m tools.reference_scores megablip/recipes/dpo.yaml
    megablip train megablip/recipes/dpo.yaml preference.stored_reference=true

A step then takes one forward instead of two.  Shards that have their scores are
passed over, so the command goes on where it was stopped; `--part 2/8` is for the
third of eight processes, each with a GPU of its own, which share the shards.  The
format, and what is refused, stand in megablip/data/reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import Progress

from megablip.checkpoint.export import ExportReader, base_of, load_tower
from megablip.checkpoint.start import check_start
from megablip.config import Config, load_config
from megablip.data.collate import collate, lay_out
from megablip.data.loader import setup_of
from megablip.data.reference import PairScore, ids_digest, made_from, read_scores, scores_path, write_scores
from megablip.data.samples import SampleReader
from megablip.engine.build import build_unfilled
from megablip.engine.topology import prepare_device
from megablip.errors import ConfigError, SampleError, ShardError
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.layout import check_tokenizer
from megablip.model.vision import encode_tiles
from megablip.records import MASTER, DecodedDocument, PlannedSequence, SampleAddress
from tools.errors import errors_end_the_program


class Scorer:
    """The reference of a recipe's preference stage, in the recipe's precision.

    Args:
        config: of the stage.

    Raises:
        ConfigError: the recipe is of another stage, or there is no model to start from.
    """

    def __init__(self, config: Config):
        if config.stage != "dpo":
            raise ConfigError(f"the stage {config.stage} has no reference", remedy="give a recipe of the stage dpo")
        check_start(config.model.path)
        check_tokenizer(config.model)
        self._data = config.data
        model_config = Blip3Config.of_run(config.model)
        export = ExportReader(config.model.path)
        self.made = made_from(config, base_of(export, model_config), model_config.layout)
        self._setup = setup_of(config, config.model.path, model_config.layout, (), None, 0)
        self.reader = SampleReader(self._setup)
        self._layout = model_config.layout
        self._device = prepare_device()
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self._model = build_unfilled(
            lambda: Blip3ForConditionalGeneration(model_config, with_vision_tower=False), dtype, self._device
        )
        for name, p in self._model.named_parameters():
            p.data.copy_(export.read(name, MASTER, tuple(p.shape), 0, p.numel()).view(p.shape))
        self._model.to(self._device).eval()
        self._tower = load_tower(export, model_config.vision_config, dtype, self._device)

    @property
    def shards(self) -> list[SampleAddress]:
        """Of all sources, each by its first sample."""
        return [
            SampleAddress(source, shard, 0)
            for source, opened in enumerate(self.reader.sources)
            for shard in range(len(opened.paths))
        ]

    def scores(self, shard: SampleAddress) -> tuple[dict[str, PairScore], int]:
        """Of each pair of a shard, by key; and how many samples are bad or fit no sequence.

        Raises:
            ShardError: two samples have one key.
        """
        found: dict[str, PairScore] = {}
        left_out: list[str] = []
        for batch in self._batches(shard, left_out):
            for key, score in self._score(batch):
                if key in found:
                    path = self.reader.sources[shard.source].paths[shard.shard]
                    raise ShardError(f"two samples have the key {key}", where=path, remedy="give them distinct keys")
                found[key] = score
        return found, len(left_out)

    def _batches(self, shard: SampleAddress, left_out: list[str]) -> Iterator[list[DecodedDocument]]:
        """Pairs laid together as they come, as many as a sequence holds; those that can't be used go to `left_out`."""
        encoder, data = self.reader.encoder, self._data
        batch: list[DecodedDocument] = []
        tokens = tiles = 0
        for sample in range(self.reader.sources[shard.source].count(shard.shard)):
            try:
                pair = self.reader.encoded(SampleAddress(shard.source, shard.shard, sample))
                costs = sum(len(side.input_ids) for side in pair), sum(side.tiles for side in pair)
                if costs[0] > data.sequence_length or costs[1] > data.max_tiles:
                    raise SampleError("the pair fits no sequence")
                decoded = [encoder.decode(side, shard.source) for side in pair]
            except SampleError as error:
                left_out.append(str(error))
                continue
            if batch and (tokens + costs[0] > data.sequence_length or tiles + costs[1] > data.max_tiles):
                yield batch
                batch, tokens, tiles = [], 0, 0
            batch += decoded
            tokens, tiles = tokens + costs[0], tiles + costs[1]
        if batch:
            yield batch

    @torch.no_grad()
    def _score(self, documents: list[DecodedDocument]) -> Iterator[tuple[str, PairScore]]:
        tiles = np.concatenate([document.tiles for document in documents])
        planned = PlannedSequence(0, 0, (), np.zeros(0, np.int64))
        micro_batch = collate([lay_out(planned, documents, (), tiles, self._layout)], self._layout).to(self._device)
        features = encode_tiles(self._tower, micro_batch.tiles)
        log_probs = (-self._model(packed=micro_batch, vision_features=features).document_loss).tolist()
        for place in range(0, len(documents), 2):
            ids = np.concatenate([side.input_ids for side in documents[place : place + 2]])
            yield documents[place].key, PairScore(ids_digest(ids), *log_probs[place : place + 2])


def score_shards(config: Config, part: int = 0, parts: int = 1) -> str:
    """Score all shards that have no scores yet, or every `parts`-th from the `part`-th on; a line that tells what is.

    Raises:
        MegablipError: as `Scorer`; or a shard has scores of something else beside it.
    """
    scorer = Scorer(config)
    pairs = left_out = known = 0
    with Progress(transient=True) as progress:
        for shard in progress.track(scorer.shards[part::parts], description="scoring shards"):
            path = scorer.reader.sources[shard.source].paths[shard.shard]
            if Path(scores_path(path)).exists():
                known += len(read_scores(path, scorer.made))
                continue
            found, skipped = scorer.scores(shard)
            write_scores(path, scorer.made, found)
            pairs, left_out = pairs + len(found), left_out + skipped
    return f"{pairs} pairs scored, {known} were known, {left_out} left out: bad, or too long for a sequence"


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of the stage dpo")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.subkey=value ...")] = None,
    part: Annotated[str, typer.Option(help="K/N: of N processes this is the K-th, from 0 on.")] = "0/1",
) -> None:
    """Score the pairs of a recipe's shards by the model that it starts from."""
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise typer.BadParameter(f"'{part}' is not K/N with K below N", param_hint="--part")
    with errors_end_the_program():
        line = score_shards(load_config(recipe, overrides or []), int(number), int(parts))
    typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
