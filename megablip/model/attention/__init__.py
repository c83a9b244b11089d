"""Attention over packed documents: one call, several backends.

`varlen_attention` takes documents laid end to end, without padding, and lets no
token see another document.  Importing this package registers it with transformers
under `ATTENTION`; a model built with `attn_implementation=ATTENTION` uses it where
its forward gets `packing=PackedLayout(...)`, and transformers' SDPA where it
doesn't (generation, with a KV cache and left padding).
"""

from megablip.model.attention.interface import ATTENTION, varlen_attention
from megablip.model.attention.select import Selection, head_sizes, select_backend, use_backend

__all__ = [
    "ATTENTION",
    "Selection",
    "head_sizes",
    "select_backend",
    "use_backend",
    "varlen_attention",
]
