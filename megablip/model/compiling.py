"""torch.compile for the decoder's blocks."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megablip.model.attention import ATTENTION

_OPAQUE = "megablip_varlen_opaque"
"""The same attention, which the compiler does not look into: lengths of documents differ in each call."""


def compile_blocks(decoder: PreTrainedModel) -> None:
    """Let each block be compiled at its first call: what lies before and behind its attention."""
    AttentionInterface.register(_OPAQUE, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[ATTENTION]))
    AttentionMaskInterface.register(_OPAQUE, ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION])
    decoder.set_attn_implementation(_OPAQUE)
    for block in decoder.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.compile(dynamic=True)  # one graph for packs of any length
