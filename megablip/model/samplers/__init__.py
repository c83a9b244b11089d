"""From tiles' patch features to visual tokens."""

from megablip.model.samplers.perceiver import PerceiverResampler, regroup_released

__all__ = ["PerceiverResampler", "regroup_released"]
