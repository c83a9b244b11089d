"""FLOPs of a step by formula, and what a device can do at best.

Model FLOPs as in PaLM (arXiv 2204.02311, appendix B): what the mathematics of
forward and backward needs on real tokens, at two for a multiply and an add.
Recomputed activations, padding of sequences and dummy tiles don't count; a tile
counts with all of its patches, though the sampler leaves out those that show no image.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from megablip.model.blip3 import Blip3Config

# Dense bf16 peaks in FLOP/s, without sparsity, by a part of the device's name; the first that fits counts.
# From NVIDIA's data sheets of each product (those that state figures with sparsity, halved).
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,  # SXM: "NVIDIA H100 80GB HBM3"
    "H800 PCIe": 756e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362.05e12,
    "L40": 181.05e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s that a device reaches at best; None for one that isn't known.

    Args:
        device_name: as torch.cuda.get_device_name gives it.
    """
    words = f" {device_name.replace('-', ' ')} "
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of forward and backward together, per unit of each part.

    Attributes:
        per_token: the decoder's blocks.
        per_label: the output head, which sees only rows with a label.
        per_pair: attention of the decoder, for each (query, key) pair that is looked at.
        per_tile: tower and sampler.
        per_image: of the sampler, on top of its tiles.
        window: tokens that one of the decoder sees at most, itself included; None: no limit.
    """

    per_token: float
    per_label: float
    per_pair: float
    per_tile: float
    per_image: float
    window: int | None

    @classmethod
    def of(cls, model: nn.Module, tower: nn.Module, config: Blip3Config) -> ModelFlops:
        """Counts the matrix products of the modules, whose weights may be partitioned or without storage.

        A product costs three times its forward where its weight is trained, twice
        where only a gradient passes through, once where none does: in a frozen tower,
        and in a frozen sampler above it.  Adapters are counted as the products they are.

        Args:
            model: a Blip3ForConditionalGeneration, with a dense (not mixture-of-experts) decoder.
            tower: inside the model or outside.
        """
        text, vision = config.text_config, config.vision_config
        patches = config.layout.patches_per_tile
        head = model.get_output_embeddings()

        # Attention is two products, scores and values, each of heads x head_dim multiply-adds for a pair.
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_pair = 3 * 4 * text.num_hidden_layers * text.num_attention_heads * width

        trained = _trained(tower)
        tower_tile = (3 if trained else 1) * 4 * vision.num_hidden_layers * patches**2 * vision.hidden_size
        for module in tower.modules():
            if isinstance(module, nn.Linear):
                tower_tile += _linear(module, frozen_factor=1) * patches
            elif isinstance(module, nn.Conv2d):  # the patch embedding; pixels need no gradient
                size = module.in_channels * module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                tower_tile += 2 * size * patches * (2 if trained else 1)
        sampler = model.sampler.flops(patches)
        if _trained(model.sampler):
            times, sampler_tile = 3, 3 * sampler.per_tile - (0 if trained else sampler.of_features)
        else:
            times = 2 if trained else 1
            sampler_tile = times * sampler.per_tile
        return cls(
            per_token=sum(_linear(m) for m in model.decoder.base_model.modules() if isinstance(m, nn.Linear)),
            per_label=_linear(head),
            per_pair=per_pair,
            per_tile=tower_tile + sampler_tile,
            per_image=times * sampler.per_image,
            # Where some layers see everything, the pairs are counted without the window.
            window=None
            if "full_attention" in (getattr(text, "layer_types", None) or ())
            else getattr(text, "sliding_window", None),
        )

    def of_step(self, *, tokens: float, labels: float, pairs: float, tiles: float, images: float) -> float:
        """FLOPs of a step with so many real tokens, labels, attended pairs, tiles and images."""
        decoder = self.per_token * tokens + self.per_label * labels + self.per_pair * pairs
        return decoder + self.per_tile * tiles + self.per_image * images


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _linear(module: nn.Linear, frozen_factor: int = 2) -> int:
    """Forward and backward of one row."""
    factor = 3 if module.weight.requires_grad else frozen_factor
    return factor * 2 * module.in_features * module.out_features
