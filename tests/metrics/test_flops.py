"""The formula against torch's own count of what a forward and a backward multiply."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megablip.metrics.flops import PEAK_FLOPS, ModelFlops, peak_flops
from tests.model.tiny import features_of, make_doc, pack, tiny_model

aten = torch.ops.aten


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
    )


def make_batch():
    return pack([make_doc(40, [(2, 1)], 0), make_doc(90, [], 1), make_doc(25, [(1, 2), (2, 2)], 2)])


@pytest.mark.parametrize("train_tower", [False, True])
def test_a_step_is_what_torch_counts(train_tower):
    model, batch = tiny_model(train_tower=train_tower), make_batch()
    assert by_formula(model, batch) == pytest.approx(measured(model, batch, None), rel=0.01)


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
    from transformers import AutoConfig

    from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration

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
    assert flops.of_step(tokens=4096, labels=4096, pairs=0, tiles=0) == pytest.approx(91.4e12, rel=0.01)
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
