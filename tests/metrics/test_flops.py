"""The formula against torch's own count of what a forward and a backward multiply."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.masking_utils import eager_mask
from transformers.models.phi3.modeling_phi3 import eager_attention_forward

from megablip.config import LoraConfig
from megablip.metrics.flops import PEAK_FLOPS, ModelFlops, peak_flops
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.lora import add_lora
from tests.model.tiny import features_of, make_doc, pack, tiny_config, tiny_model

aten = torch.ops.aten
PLAIN = "megablip_varlen_plain"  # passes for the packed attention, but sees no documents


def forward_flops(query, key, value, *args, out_shape=None, **kwargs):
    """Scores and values; of shapes [B, heads, Q, D] and [B, heads, K, D]."""
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[-2] * width


def backward_flops(grad, query, key, value, *args, out_shape=None, **kwargs):
    """Gradients of scores, queries, keys and values; scores that are computed again don't count."""
    return 2 * forward_flops(query, key, value)


# The CPU's fused attention is not among those that torch counts.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
}


def measured(model, batch, features) -> int:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        if features is None and not model.train_tower:
            features = features_of(model, batch)
        model(packed=batch, vision_features=features).loss.backward()
    return counter.get_total_flops()


def by_formula(model, batch, *, tiles: bool = True) -> float:
    flops = ModelFlops.of(model, model.vision_tower, model.config)
    return flops.of_step(
        tokens=len(batch.input_ids),
        labels=batch.valid_labels,
        pairs=sum(length**2 for length in batch.doc_lens),  # torch counts the masked half, too
        tiles=len(batch.tiles) if tiles else 0,
        images=len(batch.grid),
    )


DECODERS = {
    "phi3": {},
    "llama with grouped queries": {"model_type": "llama", "num_key_value_heads": 1},
    "qwen3 with a head size of its own": {"model_type": "qwen3", "head_dim": 20},
    "tied embeddings": {"model_type": "llama", "tie_word_embeddings": True},
}


def with_decoder(settings: dict, **kwargs) -> Blip3ForConditionalGeneration:
    config = tiny_config()
    text = config.text_config.to_dict() | settings
    config.text_config = AutoConfig.for_model(text.pop("model_type"), **text)
    return Blip3ForConditionalGeneration(config, **kwargs)


def make_batch():
    return pack([make_doc(40, [(2, 1)], 0), make_doc(90, [], 1), make_doc(25, [(1, 2), (2, 2)], 2)])


@pytest.mark.parametrize("train_tower", [False, True])
def test_a_step_is_what_torch_counts(train_tower):
    model, batch = tiny_model(train_tower=train_tower), make_batch()
    assert by_formula(model, batch) == pytest.approx(measured(model, batch, None), rel=0.01)


@pytest.mark.parametrize("train_tower", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_attention_is_what_plain_products_cost(decoder, train_tower):
    """All in matrix products, which torch counts by itself; over the pack as one document."""
    model, batch = with_decoder(DECODERS[decoder], train_tower=train_tower), make_batch()
    AttentionInterface.register(PLAIN, eager_attention_forward)
    AttentionMaskInterface.register(PLAIN, eager_mask)
    model.decoder.set_attn_implementation(PLAIN)
    model.vision_tower.set_attn_implementation("eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # in which the sampler's are plain products, too
    with FlopCounterMode(display=False) as counter:
        features = None if train_tower else features_of(model, batch)
        model(packed=batch, vision_features=features).loss.backward()
    assert not any("attention" in str(operation) for operation in counter.get_flop_counts()["Global"])
    flops = ModelFlops.of(model, model.vision_tower, model.config)
    labels, tokens, tiles = batch.valid_labels, len(batch.input_ids), len(batch.tiles)
    whole = flops.of_step(tokens=tokens, labels=labels, pairs=tokens**2, tiles=tiles, images=0)
    assert whole == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert flops.of_step(tokens=tokens, labels=labels, pairs=0, tiles=tiles, images=0) < 0.9 * whole


def test_adapters_beside_frozen_weights():
    """The first block's products pass no gradient on, of which the formula knows nothing: 1 of 8 blocks here."""
    model, batch = with_decoder({"num_hidden_layers": 8}), make_batch()
    whole = by_formula(model, batch)
    add_lora(model, LoraConfig(rank=4, dropout=0.0))
    assert by_formula(model, batch) < 0.9 * whole
    assert by_formula(model, batch) == pytest.approx(measured(model, batch, None), rel=0.03)


def test_a_frozen_decoder_only_passes_gradients_on():
    model, batch = tiny_model(), make_batch()
    whole = by_formula(model, batch)
    model.decoder.requires_grad_(False)
    assert by_formula(model, batch) < 0.8 * whole
    assert by_formula(model, batch) == pytest.approx(measured(model, batch, None), rel=0.01)


def test_text_alone_costs_no_tile():
    model, batch = tiny_model(), pack([make_doc(80, [], 0)])
    dummy = measured(model, batch, None) - by_formula(model, batch, tiles=False)
    assert dummy == pytest.approx(ModelFlops.of(model, model.vision_tower, model.config).per_tile, rel=0.05)


def test_recomputed_activations_do_not_count():
    model, batch = tiny_model(), make_batch()
    once = measured(model, batch, None)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert measured(model, batch, None) > 1.1 * once
    assert by_formula(model, batch) == pytest.approx(once, rel=0.01)


def test_the_released_model_at_4096_tokens():
    """32 layers of 3072, 8192 wide; 12 tiles; documents with sum of squares 0.19 T^2: 104 TFLOP, by hand."""
    text = AutoConfig.for_model(
        "phi3", vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    vision = AutoConfig.for_model(
        "siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=384, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Blip3ForConditionalGeneration(Blip3Config(text_config=text, vision_config=vision))
    flops = ModelFlops.of(model, model.vision_tower, model.config)
    # 0.19 T^2 is of all pairs; causal attention sees half of them.
    whole = flops.of_step(tokens=4096, labels=4096, pairs=0.19 * 4096**2 / 2, tiles=12, images=4)
    assert whole == pytest.approx(104e12, rel=0.01)
    # With half of the tokens trained, the head's part is half.
    half = flops.of_step(tokens=4096, labels=2048, pairs=0.19 * 4096**2 / 2, tiles=12, images=4)
    assert whole - half == pytest.approx(6 * 32064 * 3072 * 2048)
    assert flops.of_step(tokens=4096, labels=4096, pairs=0, tiles=0, images=0) == pytest.approx(91.4e12, rel=0.01)
    assert flops.per_pair * 0.19 * 4096**2 / 2 == pytest.approx(1.8e12, rel=0.05)
    assert 12 * flops.per_tile == pytest.approx(8.3e12 + 2.2e12, rel=0.05)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name, tera):
    assert peak_flops(name) == tera * 1e12


def test_an_unknown_device_has_no_peak():
    assert peak_flops("NVIDIA H1000") is None
    assert peak_flops("Tesla V100-SXM2-32GB") is None  # it has no bf16
    assert all(1e13 < peak < 1e16 for peak in PEAK_FLOPS.values())
