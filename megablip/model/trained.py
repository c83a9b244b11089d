"""The part of a run's model that its checkpoints hold, and that replaying a step builds again."""

from __future__ import annotations

from megablip.config import ModelConfig
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.lora import add_lora


def trained_part(config: Blip3Config, model: ModelConfig) -> Blip3ForConditionalGeneration:
    """With the tower where it is trained, and with adapters where the run has them; weights are still to be filled."""
    built = Blip3ForConditionalGeneration(config, with_vision_tower=model.train_tower, train_tower=model.train_tower)
    if model.lora:
        add_lora(built, model.lora)
    return built
