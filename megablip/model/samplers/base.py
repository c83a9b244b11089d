"""What a sampler is to the rest of the model."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from megablip.model.samplers.instruction import Instruction

if TYPE_CHECKING:
    from megablip.model.blip3 import Blip3Config


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """How many visual tokens an image has: so many, and so many for each of its tiles."""

    per_tile: int = 0
    per_image: int = 0


@dataclass(frozen=True, slots=True)
class SamplerFlops:
    """FLOPs of a forward's matrix products, two for a multiply and an add; an instruction's tokens left out.

    Attributes:
        per_tile, per_image: for each tile, and on top for each image.
        of_features: the share of `per_tile` that multiplies the tower's features
            themselves, which need no gradient where the tower is frozen.
    """

    per_tile: int
    per_image: int = 0
    of_features: int = 0


class Sampler(nn.Module, ABC):
    """From a tower's patch features to visual tokens.

    A subclass is one entry of `samplers.SAMPLERS`.  Its settings, the keys of the
    model config's `sampler`, are the keyword arguments of its constructor that
    have a default: whole numbers from 1 on.  `dim` (width of the features) and
    `output_dim` (width of the decoder) come from the model.

    In training a sampler is called once whatever the batch holds, and every one of
    its parameters must get a gradient from every call: of zeros, if need be.
    """

    reads_instruction: ClassVar[bool] = False
    """Whether `forward` needs an Instruction."""

    reads_positions: ClassVar[bool] = False
    """Whether it matters where in its tile a patch is; if so, tiles must be crops, not the released strips."""

    @classmethod
    def defaults(cls) -> dict[str, int]:
        """The settings by name."""
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    @classmethod
    @abstractmethod
    def visual_tokens(cls, settings: Mapping[str, int], patches_per_side: int) -> VisualTokens:
        """How many visual tokens a sampler of these settings makes of an image."""

    @classmethod
    def from_config(cls, settings: Mapping[str, int], config: Blip3Config) -> Self:
        """The sampler of a model."""
        return cls(**cls.surroundings(config), **settings)

    @classmethod
    def surroundings(cls, config: Blip3Config) -> dict[str, Any]:
        """Arguments of the constructor that the rest of the model decides."""
        return {"dim": config.vision_config.hidden_size, "output_dim": config.text_config.hidden_size}

    def init_parameters(self) -> None:
        """Fill the parameters that are its own and no submodule's (transformers' `initialization`)."""

    @abstractmethod
    def flops(self, patches: int) -> SamplerFlops:
        """Of a forward over tiles of so many patches; weights may be partitioned or without storage."""

    @abstractmethod
    def forward(
        self,
        features: Tensor,
        patch_mask: Tensor,
        grids: Sequence[tuple[int, int]] = (),
        instruction: Instruction | None = None,
    ) -> Tensor:
        """Visual tokens of all images, in their order.

        Args:
            features: [N, P, dim], each image's base tile, then its crops row by row.
            patch_mask: bool[N, P] on the host, True where the patch shows the image.
            grids: (columns, rows) of each image's crops; an image has 1 + columns * rows tiles.
            instruction: of each image; needed where `reads_instruction`.

        Returns:
            [N or I, K, output_dim].
        """


def tiles_of(grids: Sequence[tuple[int, int]]) -> list[int]:
    """The number of tiles of each image."""
    return [1 + columns * rows for columns, rows in grids]


def image_of_tile(grids: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """int64[N]: the number of each tile's image."""
    images = [number for number, tiles in enumerate(tiles_of(grids)) for _ in range(tiles)]
    return torch.tensor(images, device=device)
