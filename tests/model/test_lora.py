import pytest
import torch
from transformers import Phi3Config

from megablip.config import LoraConfig
from megablip.errors import ConfigError
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.lora import add_lora, base_name, initial_adapter, without_adapters
from tests.model.tiny import make_doc, pack, tiny_model

BATCH = [make_doc(12, [(2, 1)], 0), make_doc(8, [], 1)]


def adapted(**settings):
    model = tiny_model()
    add_lora(model, LoraConfig(**{"rank": 4, "dropout": 0.0} | settings))
    return model


def test_adapters_alone_are_trained_and_every_one_gets_a_gradient():
    model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained}
    assert layers == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    for _, p in model.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    model(packed=pack(BATCH)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_without_adapters_it_is_its_base():
    batch, plain, model = pack(BATCH), tiny_model(), adapted()
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p)
    with torch.no_grad():
        base = plain(packed=batch).document_loss
        assert not torch.allclose(model(packed=batch).document_loss, base)
        with without_adapters(model):
            assert torch.equal(model(packed=batch).document_loss, base)
        assert not torch.allclose(model(packed=batch).document_loss, base)
    assert any(p.requires_grad for p in model.parameters()), "still trained afterwards"


def test_parts_trained_beside_the_adapters():
    model = adapted(also_train=["embeddings", "head"], targets=["o_proj"])
    parts = {
        name.partition(".lora_")[0].rpartition(".")[2] if ".lora_" in name else name
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert parts == {"o_proj", "decoder.model.embed_tokens.weight", "decoder.lm_head.weight", "decoder.lm_head.bias"}


def test_the_first_adapters_change_nothing_and_are_the_same_on_every_rank():
    name = "decoder.model.layers.0.mlp.down_proj.lora_A.default.weight"
    first = initial_adapter(name, (4, 64), seed=3)
    assert torch.equal(first, initial_adapter(name, (4, 64), seed=3))
    assert not torch.equal(first, initial_adapter(name, (4, 64), seed=4))
    assert not torch.equal(first, initial_adapter(name.replace("0", "1"), (4, 64), seed=3))
    assert 0.11 < first.abs().max() <= 64**-0.5
    assert initial_adapter(name.replace("lora_A", "lora_B"), (64, 4), seed=3).count_nonzero() == 0
    assert initial_adapter("decoder.model.norm.weight", (64,), seed=3) is None
    assert base_name("a.down_proj.base_layer.weight") == "a.down_proj.weight"


def test_an_unknown_target_is_named():
    with pytest.raises(ConfigError, match=r"v_proj: no linear layer .* down_proj, gate_up_proj"):
        adapted(targets=["v_proj", "o_proj"])


def test_the_default_trains_about_a_fortieth_of_the_full_decoder():
    with torch.device("meta"):
        model = Blip3ForConditionalGeneration(Blip3Config(text_config=Phi3Config()), with_vision_tower=False)
        add_lora(model, LoraConfig())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.decoder.parameters() if not p.requires_grad)
    assert trained == 100_663_296
    assert 0.024 < trained / frozen < 0.027
