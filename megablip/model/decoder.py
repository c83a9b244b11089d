"""The decoder: any causal language model of transformers that packed training computes rightly.

What can go wrong silently is refused: logits that are not the output head of the
last hidden states (the loss is computed from those), layers that carry state past a
document's end, and attention with an ingredient that packed attention has not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from megablip.errors import ConfigError
from megablip.model.attention.interface import ATTENTION, check_options
from megablip.model.loss import LossHead

_PROBE = "megablip_probe"

_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")

# Config fields that, set, make a decoder which is not computed here as transformers would.
_DROPOUTS = ("attention_dropout", "attn_pdrop")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def build_decoder(config: PreTrainedConfig, head_bias: bool) -> PreTrainedModel:
    """An unfilled decoder whose output head can go straight to the loss.

    Args:
        config: of any causal language model of transformers.
        head_bias: give the head a bias, whether or not the family has one.

    Raises:
        ConfigError: transformers has no such decoder, or packed training would be wrong with it.
    """
    _check_fields(config)
    try:
        decoder = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation or ATTENTION)
    except Exception as error:  # no causal language model, or none whose attention can be replaced
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _refused(config, f"transformers can't build it ({reason})") from error
    _check_head(decoder)
    head = decoder.get_output_embeddings()
    decoder.set_output_embeddings(LossHead(head.in_features, head.out_features, bias=head_bias))
    return decoder


def as_loss_head(head: nn.Linear) -> LossHead:
    """An output head that can go straight to the loss, with the weight and bias of `head`."""
    if isinstance(head, LossHead):
        return head
    with torch.device("meta"):
        own = LossHead(head.in_features, head.out_features, bias=head.bias is not None)
    own.weight, own.bias = head.weight, head.bias
    return own


def check_attention(config: PreTrainedConfig) -> None:
    """Run a decoder without storage and look at what each layer hands to the attention (0.2 s for Phi-3-mini).

    Raises:
        ConfigError: a layer attends without knowing where documents end, or in a
            way that packed attention doesn't compute.
    """
    config = copy.deepcopy(config)
    calls: list[_Call] = []
    with torch.device("meta"), no_init_weights(), torch.no_grad():
        try:
            AutoModelForCausalLM.from_config(config, attn_implementation=_PROBE).base_model(
                inputs_embeds=torch.empty(1, 4, config.hidden_size),
                attention_mask=torch.empty(1, 1, 1, 1),
                position_ids=torch.arange(4)[None],
                use_cache=False,
                packing=calls,
            )
        except Exception as error:  # families differ in what they take
            raise _refused(config, f"its base model doesn't take packed documents ({error})") from error
    expected = _windows(config)
    if len(calls) != len(expected):
        raise _refused(config, f"{len(calls)} of its {len(expected)} layers tell the attention where documents end")
    for layer, (call, window) in enumerate(zip(calls, expected, strict=True)):
        if call.window != window:
            raise _refused(config, f"its layer {layer} has the window {call.window}, its config says {window}")
        check_options(call.options, type(call.module).__name__)


def _check_fields(config: PreTrainedConfig) -> None:
    for name in _DROPOUTS:
        if getattr(config, name, 0):
            raise _refused(config, f"packed attention has no dropout, {name} is {getattr(config, name)}", "set it to 0")
    for name in _EXPERTS:
        if (getattr(config, name, None) or 0) > 1:
            raise _refused(config, f"it has experts ({name}), whose balance no loss here keeps")
    layers = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    other = sorted(set(layers) - set(_ATTENTION_LAYERS))
    if other:
        raise _refused(config, f"layers of {', '.join(other)} carry state past a document's end")
    if not hasattr(config, "num_hidden_layers"):
        raise _refused(config, "it is no decoder of one stack of layers")


def _check_head(decoder: PreTrainedModel) -> None:
    """Raises ConfigError unless logits are the head of the last hidden states: no scale, no cap, nothing between."""
    head, base_name, base = decoder.get_output_embeddings(), decoder.base_model_prefix, decoder.base_model
    if not isinstance(head, nn.Linear) or base is decoder:
        raise _refused(decoder.config, "it has no linear output head over a base model")
    hidden, logits = _ramp(3, head.in_features), _ramp(3, head.out_features)
    head_stub, base_stub = _Stub(logits), _Stub(BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden))
    setattr(decoder, base_name, base_stub)
    try:
        decoder.set_output_embeddings(head_stub)
        with torch.no_grad():
            out = decoder(input_ids=torch.zeros(1, 3, dtype=torch.int64, device="cpu")).logits
    except Exception as error:  # families differ in how they would use a base model
        raise _refused(decoder.config, f"it calls its base model in its own way ({error})") from error
    finally:
        setattr(decoder, base_name, base)
        decoder.set_output_embeddings(head)
    if not (torch.equal(head_stub.given, hidden) and torch.equal(out.to(logits.dtype), logits)):
        raise _refused(decoder.config, "its logits are more than its output head (scaled or capped)")


class _Stub(nn.Module):
    """Gives what it was made with, and keeps what it was given."""

    def __init__(self, output: Any):
        super().__init__()
        self.output, self.given = output, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args[0] if args else None
        return self.output


def _ramp(rows: int, columns: int) -> Tensor:
    return torch.linspace(-40, 40, rows * columns, dtype=torch.float32, device="cpu").view(1, rows, columns)


@dataclass
class _Call:
    module: nn.Module
    window: int | None
    options: dict[str, Any]


def _probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packing: list[_Call] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention that computes nothing and notes its arguments in `packing`."""
    if packing is not None:
        packing.append(_Call(module, sliding_window, kwargs))
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1]), None


AttentionInterface.register(_PROBE, _probe)


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Tokens that each layer sees at most, by the config; None: all."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _refused(config: PreTrainedConfig, why: str, remedy: str = "") -> ConfigError:
    return ConfigError(
        f"a decoder of the family {config.model_type} can't be trained on packed documents: {why}",
        where="text_config",
        remedy=remedy or "choose another decoder, such as of the families Llama, Qwen or Phi-3",
    )
