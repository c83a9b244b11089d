"""One typed tree for a run: a YAML recipe plus dotted overrides.

    config = load_config("recipe.yaml", ["optimizer.lr=1e-3", "engine.ranks=4"])

An unknown key is an error that names the nearest known one.  Each field is
either *identity* (a run directory belongs to its value; changing it on resume
is refused) or *operational* (how and where the run goes; free to change).
This module imports neither torch nor transformers, so a recipe's mistakes are
reported at once.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megablip.errors import ConfigError

# A date that does not exist, a number of 5000 digits or bytes that are no text
# end in a ValueError, a thousand brackets in a RecursionError.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """A field that may change when a run is resumed."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, docstrings under fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Duration(Section):
    """An amount of training: `"2000 steps"`, `"100B tokens"` or `"3 epochs"` in YAML."""

    value: int = Field(ge=0)
    unit: Literal["steps", "tokens", "epochs"]

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, raw: Any) -> Any:
        if not isinstance(raw, str):
            return raw
        match = re.fullmatch(r"\s*(\d[\d_]{0,30}(?:\.\d{1,30})?)\s*([kMBT]?)\s*(steps|tokens|epochs?)\s*", raw)
        if not match:
            raise ValueError(f"'{raw}' is no duration; write for example '2000 steps' or '2.5M tokens'")
        scale = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[match[2]]
        value = float(match[1].replace("_", "")) * scale
        if match[3].startswith("epoch") and value != int(value):
            raise ValueError(f"'{raw}': a stage counts whole epochs, since each sample is trained once in each")
        return {"value": round(value), "unit": "epochs" if match[3].startswith("epoch") else match[3]}

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"

    def done(self, *, steps: int, tokens: int, epochs: float = 0.0) -> float:
        """Share of this duration that `steps`, `tokens` or `epochs` make up (may pass 1)."""
        return self.count(steps=steps, tokens=tokens, epochs=epochs) / max(self.value, 1)

    def count(self, *, steps: int, tokens: int, epochs: float = 0.0) -> float:
        """Which of the three this duration counts."""
        return {"steps": steps, "tokens": tokens, "epochs": epochs}[self.unit]


SchemaName = Literal["caption", "interleaved", "ocr", "grounding", "conversation", "text", "preference", "safety"]
CHAT_SCHEMAS = frozenset({"conversation", "preference", "safety"})  # whose documents have turns


class SourceConfig(Section):
    name: str
    """Names the source in logs, metrics and the data state."""
    shards: str | list[str]
    """Tar shards: a path, a URL, a glob, braces such as `part-{000..099}.tar`, or a list of these."""
    schema_name: SchemaName = Field(alias="schema")
    """On-disk schema of the samples."""
    weight: float | list[tuple[int, float]]
    """Share in the mixture, relative to the other sources' weights; or a schedule `[[0, 2.0], [5000, 0.5]]`:
    from step 0 on 2.0, from step 5000 on 0.5."""
    split: Literal["never", "text"] = "never"
    """What becomes of a document that is longer than a sequence: dropped, or cut between segments and inside text."""
    order: Literal["samples", "shards"] = "samples"
    """What is shuffled: blocks of samples, which needs an index of each shard, or whole shards."""
    granularity: int = Field(6, ge=1, le=6)
    """Of the six OCR captions, or the three of grounding: from the text alone to exact boxes."""
    system_prompt: str | None = None
    """What the system says at the head of the source's conversations that have no such turn of their own."""

    @field_validator("weight")
    @classmethod
    def _weight_is_a_schedule(cls, weight: float | list[tuple[int, float]]) -> float | list[tuple[int, float]]:
        if isinstance(weight, list):
            steps, weights = [step for step, _ in weight], [value for _, value in weight]
            if steps[:1] != [0] or steps != sorted(set(steps)):
                raise ValueError(f"a schedule's steps begin with 0 and rise, got {steps}")
            if min(weights) < 0 or not any(weights):
                raise ValueError(f"a schedule's weights are 0 or more, and not all 0, got {weights}")
        elif weight <= 0:
            raise ValueError(f"a weight is more than 0, got {weight}")
        return weight

    @property
    def weight_schedule(self) -> list[tuple[int, float]]:
        """(first step, weight) of each piece, by rising step from 0."""
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]


def _agree(sources: list[SourceConfig]) -> list[SourceConfig]:
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"sources need distinct names, got {names}")
    for source in sources:
        if source.system_prompt and source.schema_name not in CHAT_SCHEMAS:
            raise ValueError(f"{source.name}: a system_prompt is for conversations, not for '{source.schema_name}'")
    return sources


Sources = Annotated[list[SourceConfig], AfterValidator(_agree)]


class DataConfig(Section):
    sources: Sources = Field(min_length=1)
    sequence_length: int = Field(gt=0)
    """Tokens of a packed sequence, visual tokens included."""
    max_tiles: int = Field(gt=0)
    """Tiles of a packed sequence."""
    mixture_unit: Literal["tokens", "documents"] = "tokens"
    """What the weights count."""
    packing_buffer: int = Field(256, gt=0)
    """Documents that wait to be packed, for each lane."""
    decode_workers: int = operational(1, ge=0)
    """Processes of a rank that read samples and decode images; 0: planning and decoding in a thread of the rank."""
    dct_scaling: bool = False
    """Let libjpeg shrink a far too large JPEG while it decodes: faster, pixels differ by a level or two."""
    prefetch_bytes: int = operational(1 << 30, ge=0)
    """Host memory of a rank for steps kept ready: one at least, eight at most."""
    cache_dir: str | None = operational(None)
    """Folder of this node for copies of remote shards, shared by its ranks; None: a folder under the system's own."""
    cache_bytes: int = operational(100 << 30, gt=0)
    """What copies may take together, beside removed ones that are open still: at most 2 shards of each source in each
    planner and decode worker. Where the shards that lanes read at once don't fit, they are fetched again and again."""

    @model_validator(mode="after")
    def _always_some_weight(self) -> DataConfig:
        for step in sorted({step for source in self.sources for step, _ in source.weight_schedule}):
            if not any(weights_at([source.weight_schedule for source in self.sources], step)):
                raise ValueError(f"from step {step} on no source has a weight")
        return self


def weights_at(schedules: list[list[tuple[int, float]]], step: int) -> list[float]:
    """Weight of each source at a step."""
    return [[weight for first, weight in schedule if first <= step][-1] for schedule in schedules]


class BatchConfig(Section):
    lanes: int = Field(gt=0)
    """Logical data-parallel ranks: the order of data depends on this, never on the real ranks."""
    sequences_per_lane: int = Field(1, gt=0)
    """Packed sequences that each lane gives a step; the global batch is lanes x this."""
    micro_batch_sequences: int = operational(1, gt=0)
    """Packed sequences of one forward; gradient accumulation follows from it."""


Beta = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
Part = Literal["tower", "sampler", "decoder"]
PARTS: tuple[Part, ...] = get_args(Part)


class OptimizerConfig(Section):
    lr: Rate
    """Peak learning rate of all parts that `lr_by_part` does not name."""
    lr_by_part: dict[Part, Rate] = {}
    """Peak learning rates of their own, for example `{sampler: 1e-4, tower: 1e-5}`; all follow one schedule."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """Applied to matrices only, not to norms, biases, embeddings or latents."""
    clip_norm: float = Field(1.0, gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """What follows the warmup, up to the end of the duration; wsd stays at the peak until `decay` is left."""
    warmup: Duration = Duration(value=0, unit="steps")
    """The rate rises linearly over this many steps or tokens."""
    decay: Duration | None = None
    """Of wsd: the last part of the duration, in its unit, in which the rate falls linearly."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """cosine, linear and wsd end at this share of the peak."""

    @model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> OptimizerConfig:
        if (self.schedule == "wsd") != (self.decay is not None):
            raise ValueError("decay is the length of wsd's decay: give both or neither")
        return self


class LoraConfig(Section):
    """Adapters beside the decoder's frozen linear layers; tower, sampler, embeddings and head are frozen too."""

    rank: int = Field(64, gt=0)
    """On Phi-3's four fused projections 64 makes 100.7M parameters, 2.6 % of the decoder."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Of the adapters' inputs. Rank, alpha and dropout are those of the authors of VLFeedback (arXiv 2312.10665)."""
    targets: list[str] = []
    """Linear layers that get an adapter, by the last part of their names; none: all of the decoder's blocks."""
    also_train: list[Literal["sampler", "embeddings", "head"]] = []
    """Parts trained whole beside the adapters, as peft's `modules_to_save`; embeddings and head where words are new."""


class ModelConfig(Section):
    path: str
    """Folder of the Hugging Face export that the stage starts from."""
    grids: list[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]] | None = None
    """(columns, rows) templates of an image's tiles in this stage; `[]` gives the base tile alone, None those of the
    folder."""
    train_tower: bool = False
    """Train the vision tower too, on all tiles of a micro-batch at once; else it is frozen, whole on every rank."""
    activation_checkpointing: int = operational(0, ge=0)
    """Compute the activations of every so many-th block of decoder, sampler and trained tower again in the backward,
    instead of keeping them: 1 (or true) of each block, 2 of every second, 0 of none."""
    attention: Literal["auto", "flash_attn", "torch_varlen", "per_document", "dense"] = operational("auto")
    """Backend of decoder and sampler; auto: the fastest that can run here. dense is the slow reference."""
    lora: LoraConfig | None = None
    """Train adapters instead of the model's own weights."""

    @model_validator(mode="after")
    def _lora_freezes_the_tower(self) -> ModelConfig:
        if self.lora and self.train_tower:
            raise ValueError("train_tower and lora exclude each other: adapters leave the tower frozen")
        return self


class PreferenceConfig(Section):
    """The loss of stage dpo, on pairs of answers."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference; 0.1 is that of the authors of VLFeedback (arXiv 2312.10665)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Of sigmoid: the share of pairs whose order is taken to be wrong (conservative DPO)."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's own cross entropy, which keeps it likely."""
    length_normalized: bool = False
    """Compare mean log-probabilities per label instead of sums; ipo always does."""
    stored_reference: bool = False
    """Read the reference's scores, which tools/reference_scores.py writes; saves a forward, and the curve `kl`."""

    @model_validator(mode="after")
    def _smoothing_belongs_to_sigmoid(self) -> PreferenceConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError("label_smoothing is of the sigmoid loss only")
        return self


class EngineConfig(Section):
    ranks: int = operational(1, ge=1)
    """Data-parallel ranks of each machine."""
    ds_config: str = operational("zero3")
    """Name of a file of ds_configs/, or a path to one."""
    precision: Literal["bf16", "fp32"] = "bf16"
    threads: int = operational(0, ge=0)
    """CPU threads of a rank; 0 leaves the choice to torch."""
    timeout_s: int = operational(600, gt=0)
    """A collective that waits longer ends the run."""
    debug_collectives: bool = operational(False)
    """Compare which modules the ranks enter during the whole run, not during its first steps only."""
    compile_blocks: bool = operational(False)
    """Compile the decoder's blocks with torch.compile, at the first step; not with ZeRO-3."""


class CheckpointConfig(Section):
    every_steps: int = operational(500, gt=0)
    keep: int = operational(3, ge=2)
    """Committed checkpoints that stay; never fewer than two."""
    every_minutes: float | None = operational(None, gt=0)
    """Save also when so much time has passed since the last save began, by the first rank's clock."""


class LogConfig(Section):
    every_steps: int = operational(1, gt=0)
    """Steps between two points in TensorBoard and metrics.jsonl."""
    picture_every_steps: int = operational(500, ge=0)
    """Steps between two pictures of a packed example in TensorBoard, from the first step on; at the start one is
    printed too. 0: none."""
    profile_steps: list[int] = operational([])
    """Steps, counted from 1, whose torch.profiler trace of the first rank goes to RUN/profile."""


class HeldOutConfig(Section):
    """Data whose loss is measured on the way, never trained on."""

    sources: Sources = operational([])
    """As in `data`; their weights mix the sequences that are measured. None: nothing is held out."""
    every_steps: int = operational(500, gt=0)
    """Steps between two measurements; the end of the training is one too."""
    batches: int = operational(1, gt=0)
    """Global batches of each measurement, always the same ones; what the sources hold is used once at most."""

    @field_validator("sources")
    @classmethod
    def _can_be_counted(cls, sources: list[SourceConfig]) -> list[SourceConfig]:
        for source in sources:
            if source.order == "shards" or isinstance(source.weight, list) or source.schema_name == "preference":
                raise ValueError(f"{source.name}: held-out data has one weight, the order 'samples', and no pairs")
        return sources


class HealthConfig(Section):
    max_skipped_in_a_row: int = operational(10, gt=0)
    """Steps skipped one after the other, because loss or gradient was not finite, that end the run."""
    spike_deviations: float = operational(12.0, gt=0)
    """A loss so many deviations (scaled MAD) above the median of the steps before it raises an alert."""
    spike_window_steps: int = operational(128, ge=16)
    """Steps that the median is of."""
    step_limit_s: int | None = operational(None, gt=0)
    """A step that takes longer ends the run with the stacks of all threads; None: half of engine.timeout_s."""
    data_limit_s: int | None = operational(None, gt=0)
    """The same for a wait for data."""
    straggler_every_steps: int = operational(100, gt=0)
    """Steps between two reports of slow ranks."""
    straggler_ratio: float = operational(1.2, gt=1)
    """A rank is slow if its own work takes so many times the median of the ranks."""

    restarts_per_hour: int = operational(6, ge=0)
    """Failures that `python -m launcher` answers by another attempt; a second one at the same step it never does."""

    def limits_s(self, timeout_s: int) -> dict[str, float]:
        """Seconds that each phase of the loop may take; `first`: any phase the first time, with compiling."""
        data, step = (limit or timeout_s / 2 for limit in (self.data_limit_s, self.step_limit_s))
        # To wait in the exchange is to wait for another rank's data; that rank shall be the first to say so.
        exchange = min(data + 5, (data + timeout_s) / 2)
        longest = 0.9 * timeout_s  # `record` may hold a held-out evaluation
        return {"data": data, "exchange": exchange, "step": step} | dict.fromkeys(("record", "save", "first"), longest)


class Config(Section):
    """A whole run."""

    stage: Literal["pretrain", "sft", "interleave", "dpo", "safety"]
    """dpo minimizes `preference` on pairs of answers; all others the cross entropy of tokens."""
    run_dir: str = operational()
    """Checkpoints, logs and status of this run."""
    seed: int = 0
    duration: Duration
    """Training ends at the first step edge at or past this."""
    resume: Literal["auto", "never"] = operational("auto")
    """auto: go on from the newest committed checkpoint of run_dir, if any."""
    allow_changes: list[Literal["data.sources", "duration", "optimizer", "model.path", "tokenizer"]] = operational([])
    """What may differ from what the run directory was made with: sources may be added, removed, weighed anew;
    the duration and the optimizer's settings hold from the next step on; model.path: the folder that the run
    began with, or its weights; tokenizer: its tokenizer.json."""
    deterministic: bool = operational(False)
    """Only algorithms that give the same bits each time; slower on GPUs."""
    stop_after_steps: int | None = operational(None, gt=0)
    """Save and stop at this step, as if a signal had come; for rehearsals."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    preference: PreferenceConfig = PreferenceConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()
    held_out: HeldOutConfig = operational(HeldOutConfig())

    @model_validator(mode="after")
    def _epochs_can_be_counted(self) -> Config:
        if self.optimizer.warmup.unit == "epochs":
            raise ValueError("optimizer.warmup is counted in steps or tokens")
        if self.duration.unit == "epochs":
            for source in self.data.sources:
                if source.order == "shards":
                    raise ValueError(
                        f"data.sources: {source.name} is shuffled by shards, so its samples are not counted before "
                        "they are read; count the duration in steps or tokens, or shuffle it by samples"
                    )
                if isinstance(source.weight, list):
                    raise ValueError(f"data.sources: {source.name} has a schedule of weights; count steps or tokens")
        return self

    @model_validator(mode="after")
    def _parts_are_trained(self) -> Config:
        if "tower" in self.optimizer.lr_by_part and not self.model.train_tower:
            raise ValueError("optimizer.lr_by_part names the tower, which is frozen unless model.train_tower is true")
        lora = self.model.lora
        if lora and "sampler" in self.optimizer.lr_by_part and "sampler" not in lora.also_train:
            raise ValueError("optimizer.lr_by_part names the sampler, which model.lora freezes; see lora.also_train")
        return self

    @model_validator(mode="after")
    def _pairs_belong_to_dpo(self) -> Config:
        pairs = [source.name for source in self.data.sources if source.schema_name == "preference"]
        if self.stage != "dpo" and pairs:
            raise ValueError(f"data.sources: {', '.join(pairs)}: pairs of answers are for the stage dpo")
        if self.stage == "dpo" and len(pairs) < len(self.data.sources):
            raise ValueError("data.sources: the stage dpo takes sources of the schema 'preference' only")
        if self.stage == "dpo" and (not self.model.lora or self.model.lora.also_train):
            raise ValueError("the stage dpo needs model.lora without also_train: its reference has no adapters")
        return self

    @model_validator(mode="after")
    def _decay_fits_the_duration(self) -> Config:
        decay = self.optimizer.decay
        if decay and (decay.unit != self.duration.unit or decay.value > self.duration.value):
            raise ValueError(f"optimizer.decay ({decay}) is no part of the duration ({self.duration})")
        return self

    @model_validator(mode="after")
    def _limits_come_before_the_time_out(self) -> Config:
        for name in ("step_limit_s", "data_limit_s"):
            limit = getattr(self.health, name)
            if limit and limit >= self.engine.timeout_s:
                raise ValueError(
                    f"health.{name} ({limit}) must be less than engine.timeout_s ({self.engine.timeout_s}): a "
                    "collective that times out first leaves no stacks"
                )
        return self

    @model_validator(mode="after")
    def _compiled_blocks_stand_alone(self) -> Config:
        if self.engine.compile_blocks and (self.model.activation_checkpointing or self.engine.debug_collectives):
            raise ValueError(
                "engine.compile_blocks excludes model.activation_checkpointing, which would compute an attention "
                "again that the compiler does not see, and engine.debug_collectives, which watches single modules"
            )
        return self

    @model_validator(mode="after")
    def _ranks_have_lanes(self) -> Config:
        if self.engine.ranks > self.batch.lanes:
            raise ValueError(
                f"engine.ranks ({self.engine.ranks}) is larger than batch.lanes ({self.batch.lanes}): "
                "a rank without a lane has no data; use fewer ranks or more lanes"
            )
        return self


def held_out_run(config: Config) -> Config | None:
    """The run whose first batches are the held-out data of `config`: each sample once at most; None without any."""
    held_out = config.held_out
    if not held_out.sources:
        return None
    return config.model_copy(
        update={
            "run_dir": str(Path(config.run_dir) / "held_out"),
            "duration": Duration(value=1, unit="epochs"),
            "data": config.data.model_copy(update={"sources": held_out.sources}),
            "allow_changes": [],
        }
    )


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML recipe, apply `a.b=value` overrides, and validate.

    Raises:
        ConfigError: missing file, broken YAML, unknown key, wrong value.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("the recipe does not exist", where=str(path), remedy="check the path") from None
    except (OSError, *YAML_ERRORS) as error:
        raise ConfigError(f"the recipe can't be read: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise ConfigError("the recipe is not a mapping of keys to values", where=str(path))
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], where: str) -> Config:
    """Validate a mapping; `where` names its origin in errors."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, Config), where=where) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def identity_changes(old: Config, new: Config) -> list[str]:
    """Identity fields that differ, as `key: old -> new` lines."""
    before, after = _identity(old), _identity(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def refuse_changes(old: Config, new: Config, where: str) -> None:
    """Raises ConfigError if `new` is another run than `old`, but for what its `allow_changes` names."""
    allowed = tuple(new.allow_changes)
    changes = [change for change in identity_changes(old, new) if not change.startswith(allowed)]
    if changes:
        raise ConfigError(
            "the run directory belongs to another recipe; changed:\n    " + "\n    ".join(changes),
            where=where,
            remedy="choose another run_dir, undo the changes, or name them: allow_changes takes data.sources, "
            "duration, optimizer, model.path, tokenizer",
        )


def _identity(section: Section, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, field in type(section).model_fields.items():
        if (field.json_schema_extra or {}).get("operational"):
            continue
        value, key = getattr(section, name), prefix + (field.alias or name)
        if isinstance(value, Duration):
            found[key] = str(value)
        elif isinstance(value, Section):
            found |= _identity(value, key + ".")
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            for number, item in enumerate(value):
                found |= _identity(item, f"{key}.{number}.")
        else:
            found[key] = repr(value)
    return found


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{override}' is no override", where="command line", remedy="write key.subkey=value")
    try:
        value = yaml.safe_load(text)
    except YAML_ERRORS as error:
        raise ConfigError(f"the value of {key} is no YAML: {error}", where="command line") from None
    *parents, leaf = key.split(".")
    node: Any = raw
    for number, parent in enumerate(parents):
        node = _list_item(node, parent, key) if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"{'.'.join(parents[: number + 1])} is a value, not a section", where=f"override {override}"
            )
    if isinstance(node, list):
        _list_item(node, leaf, key)
        node[int(leaf)] = value
    else:
        node[leaf] = value


def _list_item(items: list[Any], number: str, key: str) -> Any:
    if not number.isdecimal() or int(number) >= len(items):
        raise ConfigError(
            f"'{number}' is no index of a list of {len(items)}", where=f"override {key}", remedy="count from 0"
        )
    return items[int(number)]


def explain(error: ValidationError, kind: type[Section]) -> str:
    """What is wrong with the values of a `kind`, a line each; an unknown key with the nearest known one."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "as a whole"
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"], kind)
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
            lines.append(f"unknown key '{key}'; {hint}")
        else:
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _known_keys(location: tuple[str | int, ...], kind: type[Section]) -> list[str]:
    """The keys that the section of a `kind` which holds `location` knows."""
    section: Any = kind
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        by_key = {field.alias or name: field for name, field in section.model_fields.items()}
        if part not in by_key:
            return []
        annotation = by_key[part].annotation
        arguments = getattr(annotation, "__args__", ())
        section = next((kind for kind in (annotation, *arguments) if _is_section(kind)), None)
        if section is None:
            return []
    return [field.alias or name for name, field in section.model_fields.items()]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
