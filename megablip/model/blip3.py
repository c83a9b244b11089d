"""The large multimodal model: vision tower, Perceiver resampler, decoder.

    tiles -> vision tower -> sampler -> put in place of <image> ids -> decoder

Importing this module registers it with transformers' Auto classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from megablip.errors import CheckpointError, ConfigError, PackingError
from megablip.model.attention import ATTENTION
from megablip.model.decoder import as_loss_head, build_decoder
from megablip.model.layout import layout_from_config
from megablip.model.packing import PackedLayout
from megablip.model.processor import Blip3Processor
from megablip.model.samplers import (
    Instruction,
    Sampler,
    VisualTokens,
    build_sampler,
    complete_settings,
    find_instructions,
    foreign_weights,
    regroup_released,
    sampler_class,
)
from megablip.model.vision import build_tower, encode_tiles, freeze, tower_config, tower_features
from megablip.records import IGNORE_LABEL, MicroBatch, VisualLayout

if TYPE_CHECKING:
    from megablip.config import ModelConfig

# The released model (arXiv 2408.08872 v1): sizes of its parts and its tile templates.
_PHI3_MINI_4K = {"sliding_window": 2047, "pad_token_id": 32011}
_SIGLIP_SO400M_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


class Blip3Config(PreTrainedConfig):
    """Defaults are the released xGen-MM's, with Phi-3-mini and SigLIP-so400m.

    Args:
        text_config: of any transformers causal language model; where its `tie_word_embeddings` is true, the
            output head's weight is the embeddings' (a bias of the head is its own).
        vision_config: of the tower: SigLIP, SigLIP 2 or CLIP, or of a whole such model; with the
            mean and standard deviation that pixels are normalised with (vision.tower_config).
        sampler: `kind`, one of samplers.SAMPLERS, and the settings of that kind; what is
            left out is the released model's, a `perceiver` of 128 latents.
        grids: (columns, rows) templates of an image's tiles; none gives the base tile alone.
        grid_rule: how an image's template is chosen (data.images.choose_grid).
        tile_layout: what the sampler takes for one tile: `crops`, the crops of the image; or
            `released`, for weights of xGen-MM: that code stitches the crops into one map of patches and
            cuts it again without undoing the order, so that in grids of several columns each "tile" is a
            strip of full width (samplers.regroup_released).
        image_token_id: the id that stands for one visual token.
        user_turn_ids, turn_end_id: the ids that a user's turn begins with and the one that
            ends it (ChatFormat.user_turn), for samplers that read instructions; None
            where the tokenizer has no chat format.
        head_bias: whether the output head has a bias; released weights have one.
    """

    model_type = "megablip"
    sub_configs_defaults = {  # noqa: RUF012
        "text_config": SubConfigSpec(AutoConfig, "phi3", _PHI3_MINI_4K),
        "vision_config": SubConfigSpec(AutoConfig, "siglip_vision_model", _SIGLIP_SO400M_384),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    sampler: dict | None = None
    grids: list | tuple = _GRIDS
    grid_rule: Literal["released", "paper"] = "released"
    tile_layout: Literal["crops", "released"] = "crops"
    image_token_id: int = 32012
    user_turn_ids: list[int] | tuple[int, ...] | None = (32010,)
    turn_end_id: int | None = 32007
    pad_token_id: int | None = 32011
    head_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, visual_tokens: dict | None = None, **kwargs):
        super().__post_init__(**kwargs)
        self.vision_config = tower_config(self.vision_config)
        self.sampler = complete_settings(self.sampler or {})
        self.grids = [list(grid) for grid in self.grids]
        if visual_tokens not in (None, asdict(self.visual_tokens)):
            raise ConfigError(
                f"the sampler makes {asdict(self.visual_tokens)} visual tokens, and visual_tokens says {visual_tokens}",
                where="config.json",
                remedy="leave visual_tokens as it was saved; it follows from `sampler`",
            )

    @property
    def visual_tokens(self) -> VisualTokens:
        """How many an image has; written to config.json for those who read it without the model."""
        settings, vision = complete_settings(self.sampler), self.vision_config
        return sampler_class(settings).visual_tokens(settings, vision.image_size // vision.patch_size)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"visual_tokens": asdict(self.visual_tokens)}

    @classmethod
    def of_run(cls, model: ModelConfig) -> Blip3Config:
        """That of the run's model folder, with the run's own grids if it has any."""
        config = cls.from_pretrained(model.path)
        if model.grids is not None:
            config.grids = [list(grid) for grid in model.grids]
        return config

    @property
    def layout(self) -> VisualLayout:
        """How this model's images become tiles and visual tokens."""
        return layout_from_config(
            {
                "vision_config": vars(self.vision_config),
                "visual_tokens": asdict(self.visual_tokens),
                "grids": self.grids,
                "grid_rule": self.grid_rule,
            }
        )

    def check(self) -> None:
        """Raises ConfigError for what can't be built or trained."""
        if self.tie_word_embeddings:
            raise ConfigError(
                "whether the output head is tied to the embeddings is the decoder's to say",
                where="tie_word_embeddings",
                remedy="set text_config.tie_word_embeddings instead",
            )
        self.check_ids(torch.tensor([self.image_token_id], device="cpu"))

    def check_ids(self, input_ids: Tensor) -> None:
        """Raises ConfigError for ids that the decoder has no row for."""
        rows, highest = self.text_config.vocab_size, int(input_ids.max()) if input_ids.numel() else 0
        if highest >= rows:
            raise ConfigError(
                f"the decoder has {rows} embedding rows and none for id {highest}",
                where="text_config.vocab_size",
                remedy="make the model with its tokenizer: `megablip convert init` gives each id a row",
            )
        sampler, kind = sampler_class(self.sampler), self.sampler["kind"]
        if sampler.reads_instruction and None in (self.user_turn_ids, self.turn_end_id):
            raise ConfigError(
                f"a sampler of kind '{kind}' reads the user's turns, and nothing says what marks them",
                where="user_turn_ids, turn_end_id",
                remedy="take a tokenizer with a chat format, or another sampler.kind",
            )
        if sampler.reads_positions and self.tile_layout == "released":
            raise ConfigError(
                f"a sampler of kind '{kind}' needs whole crops, and the released layout cuts them into strips",
                where="tile_layout",
                remedy="set tile_layout to crops",
            )


@dataclass
class PackedLoss(ModelOutput):
    """What a training forward returns; all float32.

    Attributes:
        loss: the summed loss over the micro-batch's labels; carries the gradient.
        document_loss: [D] sums; detached, unless the forward was called with `by_document`.
        document_labels: [D] how many labels each sum is over.
        document_divergence: [D] sums of the next token's KL divergence from a reference, detached; where there is one.
        hidden: [T, d] the decoder's last hidden states, detached; where the forward was called with `by_document`.
    """

    loss: Tensor | None = None
    document_loss: Tensor | None = None
    document_labels: Tensor | None = None
    document_divergence: Tensor | None = None
    hidden: Tensor | None = None


class Blip3ForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The LMM, with two ways in.

    Training: `model(packed=micro_batch, vision_features=features)` -> PackedLoss,
    or without features where the tower is trained too.  One call of the tower, one
    of the sampler and one of the head whatever the batch holds, so that ZeRO-3's
    ranks agree, and every parameter of them gets a gradient.

    Inference: `model(input_ids, attention_mask, tiles=..., patch_mask=..., grids=...)`
    and `model.generate(...)` with the same arguments, as Blip3Processor makes them.

    Args:
        with_vision_tower: False leaves `vision_tower` None, for a trainer that keeps
            the frozen tower elsewhere and gives `vision_features`.
        train_tower: the tower has gradients, and no pooling head; else it is frozen.
    """

    config: Blip3Config
    config_class = Blip3Config
    main_input_name = "input_ids"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["PerceiverAttention"]  # noqa: RUF012

    def __init__(self, config: Blip3Config, with_vision_tower: bool = True, train_tower: bool = False):
        super().__init__(config)
        config.check()
        self.train_tower = train_tower
        self.vision_tower = None
        if with_vision_tower:
            tower = build_tower(config.vision_config, pooling_head=not train_tower)
            self.vision_tower = tower if train_tower else freeze(tower)
        self.sampler = build_sampler(config)
        self.decoder = build_decoder(config.text_config, config.head_bias)
        # A generated <image> id would have no image behind it.
        self.generation_config.suppress_tokens = [config.image_token_id]
        self.post_init()
        self.tie_weights()  # which post_init leaves out where the engine has switched initialisation off

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The sampler's; tower and decoder have their own. torch's defaults, as in the released code."""
        if isinstance(module, Sampler):
            module.init_parameters()
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, name_or_folder, *args, config=None, output_loading_info: bool = False, **kwargs):
        """As of any transformers model, but that weights of another sampler are refused.

        Raises:
            CheckpointError: `config` names another kind of sampler than the weights were
                saved with, or they lack weights of the sampler.
        """
        hub = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder", "token") if name in kwargs}
        stored = cls.config_class.from_pretrained(name_or_folder, **hub)
        sampler = complete_settings(kwargs.get("sampler") or getattr(config, "sampler", None) or stored.sampler)
        if sampler["kind"] != stored.sampler["kind"]:
            raise CheckpointError(
                f"the model's sampler is of kind '{sampler['kind']}', and the weights are '{stored.sampler['kind']}'",
                where=str(name_or_folder),
                remedy="leave out the config; a sampler's kind can't be changed afterwards",
            )
        allowed = kwargs.pop("ignore_mismatched_sizes", False)
        model, report = super().from_pretrained(
            name_or_folder, *args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        resized = {key[0]: key[1:] for key in report["mismatched_keys"]}
        missing, unexpected, wrong = (
            {name.removeprefix("sampler.") for name in names if name.startswith("sampler.")}
            for names in (report["missing_keys"], report["unexpected_keys"], resized)
        )
        if missing or wrong:
            own = {name for name, _ in model.sampler.named_parameters()}
            found = own - missing | unexpected
            raise foreign_weights(found, own, model.config, str(name_or_folder), resized=wrong)
        if resized and not allowed:
            name, shapes = next(iter(resized.items()))
            raise CheckpointError(
                f"{name} is {tuple(shapes[0])} in the folder and {tuple(shapes[1])} in the model",
                where=str(name_or_folder),
                remedy="config.json and the weights must belong together",
            )
        return (model, report) if output_loading_info else model

    def train(self, mode: bool = True) -> Blip3ForConditionalGeneration:
        super().train(mode)
        if self.vision_tower is not None and not self.train_tower:
            freeze(self.vision_tower)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder.set_output_embeddings(as_loss_head(new_embeddings))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        tiles: Tensor | None = None,
        patch_mask: Tensor | None = None,
        grids: Tensor | None = None,
        vision_features: Tensor | None = None,
        packed: MicroBatch | None = None,
        by_document: bool = False,
        reference_hidden: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> PackedLoss | CausalLMOutputWithPast:
        """Training on a pack, or inference on a padded batch.

        Args:
            packed: documents laid end to end; needs nothing else but `vision_features`.
            vision_features: [N, P, C], the tower's output for `packed.tiles` or for `tiles`;
                None calls the tower inside, in training with its gradient.
            by_document: let each document's loss carry its gradient, for losses that weigh documents.
            reference_hidden: [T, d], another model's for the same pack, to measure the distance from it.
            input_ids: int64[B, L], with one `<image>` id for each visual token.
            labels: int64[B, L], aligned with input_ids; gives the mean loss.
            tiles: uint8[N, 3, S, S], those of all rows' images in order.
            patch_mask: bool[N, P].
            grids: int[I, 2], (columns, rows) of each image.

        Raises:
            PackingError: visual features and `<image>` ids differ in number.
            ConfigError: an id that the decoder has no row for.
        """
        if packed is not None:
            return self._packed_loss(packed, vision_features, by_document, reference_hidden)
        if inputs_embeds is None:
            is_first = past_key_values is None or past_key_values.get_seq_length() == 0
            if is_first:
                self.config.check_ids(input_ids)
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if vision_features is None and tiles is not None and len(tiles):
                vision_features = encode_tiles(self.vision_tower, tiles)
            if is_first:
                inputs_embeds = self._put_images(inputs_embeds, input_ids, vision_features, patch_mask, grids)
        outputs = self.decoder.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_LABEL
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def packed_hidden_states(
        self, packed: MicroBatch, vision_features: Tensor | None = None
    ) -> tuple[Tensor, PackedLayout]:
        """The decoder's last hidden states, [T, d], and the documents' layout.

        Raises:
            ConfigError: the decoder has another attention, which would let documents see each other.
        """
        attention = self.decoder.config._attn_implementation
        if not str(attention).startswith(ATTENTION):
            raise ConfigError(
                f"a pack needs the attention {ATTENTION}, and the decoder's is {attention}",
                where="text_config",
                remedy=f"decoder.set_attn_implementation('{ATTENTION}'); models that share a config object share this",
            )
        if vision_features is None:
            vision_features = tower_features(self.vision_tower, packed.tiles)
        embeds = self._insert_images(
            self.get_input_embeddings()(packed.input_ids),
            packed.input_ids,
            packed.visual_token_index,
            vision_features,
            packed.patch_mask,
            [(0, 0)] if packed.dummy else packed.grid.tolist(),
            starts=packed.cu_seqlens[:-1].long(),
            names=[f"document {key}" for key in packed.keys],
            dummy=packed.dummy,
        )
        layout = PackedLayout(packed.doc_lens, packed.cu_seqlens)
        outputs = self.decoder.base_model(
            inputs_embeds=embeds.unsqueeze(0),
            # transformers takes a mask of four dimensions for finished and builds none
            # (it would be T x T); the packed attention looks at `packing` instead.
            attention_mask=embeds.new_ones(1, 1, 1, 1),
            position_ids=packed.position_ids.unsqueeze(0),
            use_cache=False,
            packing=layout,
        )
        return outputs.last_hidden_state.squeeze(0), layout

    def _packed_loss(
        self,
        packed: MicroBatch,
        vision_features: Tensor | None,
        by_document: bool,
        reference_hidden: Tensor | None,
    ) -> PackedLoss:
        hidden, layout = self.packed_hidden_states(packed, vision_features)
        found = self.get_output_embeddings()(hidden, packed.labels, by_document, reference_hidden)
        columns = [found.per_row, torch.ones_like(found.per_row)]
        columns += [] if found.divergence is None else [found.divergence]
        document = layout.document_index.index_select(0, found.rows)
        sums = found.per_row.new_zeros(len(columns), len(packed.doc_lens))
        loss, labels, *divergence = sums.index_add(1, document, torch.stack(columns))
        return PackedLoss(
            loss=found.total,
            document_loss=loss,
            document_labels=labels.detach(),
            document_divergence=divergence[0].detach() if divergence else None,
            hidden=hidden.detach() if by_document else None,
        )

    def _put_images(self, embeds: Tensor, input_ids: Tensor, features, patch_mask, grids) -> Tensor:
        """[B, L, d] embeddings with those of `<image>` ids replaced, row by row."""
        rows, length = input_ids.shape
        index = (input_ids == self.config.image_token_id).flatten().nonzero().squeeze(1)
        filled = self._insert_images(
            embeds.flatten(0, 1),
            input_ids.flatten(),
            index,
            features,
            patch_mask,
            [] if grids is None else grids.tolist(),
            starts=torch.arange(0, rows * length, length, device=embeds.device),
            names=[f"row {number} of the batch" for number in range(rows)],
        )
        return filled.view_as(embeds)

    def _insert_images(
        self,
        embeds: Tensor,
        input_ids: Tensor,
        index: Tensor,
        features: Tensor | None,
        patch_mask: Tensor | None,
        grids: Sequence[tuple[int, int]],
        *,
        starts: Tensor,
        names: Sequence[str],
        dummy: bool = False,
    ) -> Tensor:
        """[T, d] embeddings with those of `<image>` ids replaced: the one place for training and inference.

        Args:
            index: int64[V], places of the `<image>` ids.
            features: [N, P, C]; None: there is no tile.
            grids: of each image; those of all make the N tiles.
            starts: int64[D], where documents, or rows, begin.
            names: of the documents, for errors.
            dummy: the one tile is no image's.
        """
        layout = self.config.layout
        counts = [] if dummy else [layout.visual_tokens(grid) for grid in grids]
        tiles = 0 if features is None else len(features)
        if len(index) != sum(counts) or tiles != sum(map(layout.tiles, grids)):
            raise _wrong_places(index, counts, tiles, starts, names)
        if features is None:
            return embeds
        instruction = None
        if self.sampler.reads_instruction:
            first = index.new_tensor([0] if dummy else [0, *counts[:-1]]).cumsum(0)
            config = self.config
            instruction = find_instructions(
                input_ids,
                embeds,
                starts,
                first if dummy else index[first],
                user_turn=config.user_turn_ids,
                end_id=config.turn_end_id,
                image_id=config.image_token_id,
            )
        visual = self._visual_tokens(features, patch_mask, grids, instruction)
        if dummy:
            # An empty sum is 0 whatever the features hold, and gives sampler and tower a gradient of
            # exact zeros.  Without one, ZeRO-3 would step it with the gradient of an earlier step.
            return embeds + visual.flatten()[:0].sum().to(embeds.dtype)
        return embeds.index_copy(0, index, visual.flatten(0, 1).to(embeds.dtype))

    def _visual_tokens(
        self,
        features: Tensor,
        patch_mask: Tensor,
        grids: Sequence[tuple[int, int]],
        instruction: Instruction | None = None,
    ) -> Tensor:
        """[N, P, C] features -> [N or I, K, d]."""
        patch_mask = patch_mask.cpu()  # in training it is there already
        if self.config.tile_layout == "released":
            features, patch_mask = regroup_released(features, patch_mask, grids)
        return self.sampler(features, patch_mask, grids, instruction)

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, use_cache=True, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if not is_first_iteration and use_cache:  # the images are in the cache
            for name in ("tiles", "patch_mask", "grids", "vision_features"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams and several samples of a prompt: repeat all its tiles together, row by row."""
        images = {name: model_kwargs.pop(name, None) for name in ("tiles", "patch_mask", "grids", "vision_features")}
        if expand_size > 1 and any(value is not None for value in images.values()):
            raise ConfigError(
                f"one prompt can't give {expand_size} sequences where images are part of it",
                where="generate",
                remedy="repeat the prompt in the batch instead of num_beams or num_return_sequences",
            )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {name: value for name, value in images.items() if value is not None}


def _wrong_places(
    index: Tensor, counts: Sequence[int], tiles: int, starts: Tensor, names: Sequence[str]
) -> PackingError:
    """Names the first document whose places its images don't fill."""
    places = torch.bincount(torch.bucketize(index, starts, right=True) - 1, minlength=len(names)).tolist()
    remaining, where = list(counts), ", ".join(names)
    for name, wanted in zip(names, places, strict=True):
        filled = 0
        while remaining and filled < wanted:
            filled += remaining.pop(0)
        if filled != wanted:
            where = f"{name}, or an image of it"
            break
    return PackingError(
        f"{len(counts)} images in {tiles} tiles make {sum(counts)} visual tokens, but there are {len(index)} places",
        where=where,
        remedy="give each image exactly one <image> id for each of its visual tokens",
    )


AutoConfig.register(Blip3Config.model_type, Blip3Config)
AutoModel.register(Blip3Config, Blip3ForConditionalGeneration)
AutoModelForImageTextToText.register(Blip3Config, Blip3ForConditionalGeneration)
AutoProcessor.register(Blip3Config, Blip3Processor)
