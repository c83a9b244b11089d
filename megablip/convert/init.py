"""The folder that a run starts from: a given tower, a given or a random decoder, a random sampler.

Every id of the tokenizer gets a row of the decoder's tables, before anything is
sharded.  Rows of tokens that the decoder has never seen, among them spare rows as
Phi-3's from 32011 on, begin as the mean of the rows that it has seen (Hewitt,
"Initializing new word embeddings", 2021) plus noise, a tenth of their deviation, that
tells them apart.  The head's bias, which Phi-3 has not, begins as zeros.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from megablip.chat import chat_format, end_ids
from megablip.checkpoint.export import ExportReader
from megablip.checkpoint.tensors import TensorSource
from megablip.checkpoint.writer import ShardWriter, new_folder, precision
from megablip.convert.sources import InMemory, Joined, Span, Spliced, copy, under_prefix
from megablip.convert.tokenizers import extended_tokenizer, save_processor
from megablip.errors import CheckpointError, ConfigError, MegablipError
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.samplers import build_sampler
from megablip.tokens import Tokenizer

_TOWER, _DECODER = "vision_tower.", "decoder."
_NOISE = 0.1


def init_model(
    output: Path,
    *,
    tower: Path,
    tokenizer: Path | None = None,
    decoder: Path | None = None,
    model: Path | None = None,
    seed: int = 0,
    dtype: str = "fp32",
) -> None:
    """Write the folder that a run starts from. Weights pass from file to file; in memory are random ones only.

    Args:
        tower: folder of a SigLIP or CLIP model, or of its vision part alone.
        tokenizer: folder of a tokenizer, by default the decoder's; tokens that it lacks are
            appended: <pad>, then xGen-MM's three.
        decoder: folder of a causal language model; None: random, of the sizes in `model`.
        model: YAML with `decoder` (a transformers config; only without a given one), `sampler`,
            `grids`, and, where they are not the defaults of Blip3Config, `grid_rule`,
            `tile_layout` and `head_bias`. None: the release's sampler and grids.
        seed: of what is random.
        dtype: fp32, bf16 or fp16.

    Raises:
        ConfigError: a path that is not there, settings that make no model, `output` exists.
        CheckpointError: a folder lacks a weight.
    """
    torch_dtype, tokenizer = precision(dtype), tokenizer or decoder
    if tokenizer is None:
        raise ConfigError("no tokenizer is given", where="--tokenizer", remedy="give its folder, or that of a decoder")
    needed = [tower / "config.json", tokenizer / "tokenizer.json", *([model] if model else [])]
    for path in [*needed, *([decoder / "config.json"] if decoder else [])]:
        if not path.exists():
            raise ConfigError("the file does not exist", where=str(path), remedy="check the path")
    settings = _read_settings(model, given_decoder=decoder is not None)
    with new_folder(output) as staging:
        tokens = extended_tokenizer(tokenizer, staging)
        torch.manual_seed(seed)
        where = f"{model}, {tower}" + (f", {decoder}" if decoder else "")
        try:
            config = _config(settings, decoder, tower, tokens, staging)
            layout = config.layout
            with torch.device("meta" if decoder else "cpu"):
                built = Blip3ForConditionalGeneration(config)
        except MegablipError:
            raise
        except Exception as error:  # transformers and torch raise all kinds for sizes that don't fit
            raise ConfigError(
                f"these settings make no model: {error}", where=where, remedy="mend the settings"
            ) from error
        weights = _weights(built, tower, decoder, tokens, seed)
        config.dtype = torch_dtype
        config.architectures = [type(built).__name__]
        config.save_pretrained(staging)
        built.generation_config.save_pretrained(staging)
        save_processor(staging, layout)
        with ShardWriter(staging, weights.shapes, torch_dtype) as writer:
            copy(weights, writer)
    count = sum(math.prod(shape) for shape in weights.shapes.values())
    print(f"wrote {output}: {count:,} parameters")


def _read_settings(path: Path | None, given_decoder: bool = False) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path else {"sampler": {}, "grids": None}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"the file is no YAML: {error}", where=str(path)) from None
    settings = {"grid_rule": "released", "tile_layout": "crops", "head_bias": True}
    settings |= found if isinstance(found, dict) else {}
    kinds = {"grid_rule": str, "tile_layout": str, "head_bias": bool, "sampler": dict, "grids": list}
    kinds |= {} if given_decoder else {"decoder": dict}
    if path and {key: type(value) for key, value in settings.items()} != kinds:
        raise ConfigError(
            "the file needs "
            + ("the mapping sampler, no decoder" if given_decoder else "the mappings decoder and sampler")
            + " and the list grids",
            where=str(path),
        )
    if not path and not given_decoder:
        raise ConfigError("no sizes are given", where="--model", remedy="give a YAML of sizes, or a --decoder")
    return {key: value for key, value in settings.items() if value is not None}


def _config(
    settings: dict[str, Any], decoder: Path | None, tower: Path, tokens: Tokenizer, folder: Path
) -> Blip3Config:
    special = {"pad_token_id": tokens.pad_id, "bos_token_id": tokens.bos_id, "eos_token_id": end_ids(tokens, folder)}
    chat = chat_format(tokens, folder)
    user_turn_ids, turn_end_id = chat.user_turn(tokens) if chat else (None, None)
    if decoder:
        text = AutoConfig.from_pretrained(decoder)
        text.vocab_size = max(text.vocab_size, tokens.vocab_size)
        for name, number in special.items():
            setattr(text, name, number)
    else:
        sizes = dict(settings.pop("decoder"))
        sizes |= {"vocab_size": max(sizes.get("vocab_size", 0), tokens.vocab_size)} | special
        text = AutoConfig.for_model(sizes.pop("model_type", None), **sizes)
    return Blip3Config(
        text_config=text,
        vision_config=_vision_config(tower),
        image_token_id=tokens.image_id,
        user_turn_ids=user_turn_ids,
        turn_end_id=turn_end_id,
        pad_token_id=tokens.pad_id,
        **settings,
    )


def _vision_config(tower: Path) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(tower)
    return getattr(config, "vision_config", config)


def _weights(
    built: Blip3ForConditionalGeneration, tower: Path, decoder: Path | None, tokens: Tokenizer, seed: int
) -> TensorSource:
    names = [name for name, _ in built.named_parameters()]
    visual = [name.removeprefix(_TOWER) for name in names if name.startswith(_TOWER)]
    parts = under_prefix(ExportReader(tower), visual, _TOWER)
    if decoder:
        built.sampler = build_sampler(built.config)
        parts |= _given_decoder(built, decoder, tokens, seed)
    random = {name: value for name, value in built.named_parameters() if name not in parts}
    held = InMemory(Path("memory"), random)
    joined = Joined(tower, parts | {name: (held, name) for name in random})
    for name, value in built.named_parameters():
        if joined.shapes[name] != tuple(value.shape):
            raise ConfigError(
                f"{name} is {joined.shapes[name]} in the files and {tuple(value.shape)} by their config",
                where=f"{tower}, {decoder}",
                remedy="config.json and the weights must belong together",
            )
    return joined


def _given_decoder(
    built: Blip3ForConditionalGeneration, folder: Path, tokens: Tokenizer, seed: int
) -> dict[str, tuple[TensorSource, str]]:
    """Where each of the decoder's tensors comes from; its tables with rows for all tokens."""
    source, own = ExportReader(folder), _own_vocabulary(folder, tokens)
    shapes, modules = source.shapes, {module: name for name, module in built.decoder.named_modules()}
    embeddings = f"{modules[built.get_input_embeddings()]}.weight"
    head, bias = (f"{modules[built.get_output_embeddings()]}.{kind}" for kind in ("weight", "bias"))
    generator = torch.Generator().manual_seed(seed)
    tables, found = {}, {}
    for name, value in built.decoder.named_parameters():
        if name not in (embeddings, head, bias):
            found |= under_prefix(source, [name], _DECODER)
        elif name == bias and name not in shapes:  # the family has none
            tables[name] = (tuple(value.shape), [])
        elif name in shapes:
            known = min(own, shapes[name][0])
            tables[name] = _table(source, name, known, tuple(value.shape), tokens.vocab_size, generator)
        else:
            raise CheckpointError(
                f"there is no tensor {name}",
                where=str(folder),
                remedy="config.json and the weights must belong together",
            )
    spliced = Spliced(
        folder,
        {name: shape for name, (shape, _) in tables.items()},
        dict.fromkeys(tables, torch.float32),
        {name: spans for name, (_, spans) in tables.items()},
    )
    return found | {_DECODER + name: (spliced, name) for name in tables}


def _own_vocabulary(folder: Path, tokens: Tokenizer) -> int:
    """How many ids the decoder was trained with; all its rows if it brings no tokenizer.

    Raises:
        ConfigError: the tokenizer gives its tokens other ids.
    """
    if not (folder / "tokenizer.json").exists():
        return 2**62
    import tokenizers

    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    moved = [token for token, number in own.get_vocab().items() if tokens.id_of(token) != number]
    if moved:
        raise ConfigError(
            f"{len(moved)} tokens of the decoder's tokenizer have other ids in the given one, for example {moved[0]!r}",
            where=str(folder),
            remedy="give a tokenizer that extends the decoder's",
        )
    return own.get_vocab_size()


def _table(
    source: TensorSource, name: str, known: int, shape: tuple[int, ...], ids: int, generator: torch.Generator
) -> tuple[tuple[int, ...], list[Span]]:
    """A table's known rows, new ones up to `ids`, and the spare rows after that."""
    row, stored = math.prod(shape[1:]), source.shapes[name][0]
    spans = [Span(0, known * row, source, name)]
    last = max(known, ids)
    if last > known:
        fresh = _new_rows(source, name, known, row, last - known, generator)
        spans.append(Span(known * row, last * row, InMemory(source.where, {name: fresh}), name))
    if stored > last:
        spans.append(Span(last * row, stored * row, source, name, last * row))
    return shape, spans


def _new_rows(
    source: TensorSource, name: str, known: int, row: int, count: int, generator: torch.Generator
) -> torch.Tensor:
    """fp32[count, row]: mean of the known rows, and noise."""
    total, squares = torch.zeros(row, dtype=torch.float64), torch.zeros(row, dtype=torch.float64)
    at_once = max(2**20 // row, 1)
    for start in range(0, known, at_once):
        end = min(start + at_once, known)
        values = source.elements(name, start * row, end * row).view(-1, row).double()
        total += values.sum(0)
        squares += values.square().sum(0)
    mean = total / known
    deviation = (squares / known - mean.square()).clamp_(min=0).sqrt()
    noise = torch.randn(count, row, generator=generator, dtype=torch.float64)
    return (mean + _NOISE * deviation * noise).float()
