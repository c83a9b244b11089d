import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from megablip.config import ModelConfig
from megablip.errors import ConfigError, PackingError
from megablip.model.attention import ATTENTION
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.layout import read_layout
from megablip.model.vision import encode_tiles
from megablip.records import IGNORE_LABEL, VisualLayout

from .tiny import (
    IMAGE_ID,
    docs,
    features_of,
    gradients,
    left_padded,
    make_doc,
    pack,
    prompts,
    tiny_config,
    tiny_model,
)


def test_packed_equals_documents_alone():
    model = tiny_model(window=16)
    packed = pack(docs())
    out = model(packed=packed, vision_features=features_of(model, packed))
    out.loss.backward()
    together = gradients(model)
    model.zero_grad()
    for number, doc in enumerate(docs()):
        alone = pack([doc])
        single = model(packed=alone, vision_features=features_of(model, alone))
        single.loss.backward()
        torch.testing.assert_close(out.document_loss[number], single.loss.detach(), atol=0, rtol=1e-6)
        assert out.document_labels[number] == alone.valid_labels == single.document_labels[0]
    torch.testing.assert_close(out.loss.detach(), out.document_loss.sum(), atol=0, rtol=1e-6)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(together[name], grad, atol=1e-5 * grad.abs().max().item(), rtol=1e-5, msg=name)


def test_packed_equals_ordinary_transformers_attention():
    """The same documents, one by one through HF's own attention and F.cross_entropy."""
    model = tiny_model(window=16)
    packed = pack(docs())
    out = model(packed=packed, vision_features=features_of(model, packed))
    model.set_attn_implementation({"text_config": "eager"})
    for number, doc in enumerate(docs()):
        single = model(
            doc.input_ids[None],
            labels=doc.labels[None],
            tiles=doc.tiles,
            patch_mask=doc.patch_mask,
            grids=torch.tensor(doc.grids).reshape(-1, 2),
        )
        torch.testing.assert_close(
            out.document_loss[number] / out.document_labels[number], single.loss, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_no_document_leaks_into_another(changed):
    model = tiny_model(window=16)
    first = docs()
    second = docs()
    second[changed] = make_doc(len(second[changed].input_ids) // 2, [(1, 2)], seed=99)
    rows = []
    for batch in (pack(first), pack(second)):
        with torch.no_grad():
            hidden, layout = model.packed_hidden_states(batch, features_of(model, batch))
        rows.append(model.get_output_embeddings()(hidden).split(layout.doc_lens))
    for number, (before, after) in enumerate(zip(*rows, strict=True)):
        if number != changed:
            torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)
    assert rows[0][changed].shape != rows[1][changed].shape or not torch.allclose(rows[0][changed], rows[1][changed])


def test_trained_tower_is_called_once_with_its_gradient():
    trained, frozen = tiny_model(train_tower=True), tiny_model()
    packed, calls = pack(docs()), []
    trained.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    trained.train()
    trained(packed=packed).loss.backward()
    frozen(packed=packed, vision_features=features_of(frozen, packed)).loss.backward()
    assert len(calls) == 1
    found, expected = gradients(trained), gradients(frozen)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)
    tower = {name: grad for name, grad in found.items() if name not in expected}
    assert set(tower) == {f"vision_tower.{name}" for name, _ in trained.vision_tower.named_parameters()}
    assert all(grad.any() for grad in tower.values())
    # Against a difference quotient, along a random direction.
    weights = dict(trained.named_parameters())
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(grad.shape, generator=generator) for name, grad in tower.items()}
    losses = []
    for shift in (1e-3, -2e-3):
        for name, value in direction.items():
            weights[name].data += shift * value
        losses.append(float(trained(packed=packed).loss.detach()))
    slope = sum(float((grad * direction[name]).sum()) for name, grad in tower.items())
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


def test_trained_tower_has_no_pooling_head_and_the_same_features():
    config = tiny_config()
    config.vision_config.vision_use_head = True
    whole = Blip3ForConditionalGeneration(config).eval()
    trained = Blip3ForConditionalGeneration(config, train_tower=True).eval()
    state = whole.state_dict()
    dropped = {name for name in state if name not in trained.state_dict()}
    assert dropped
    assert all(name.startswith("vision_tower.head.") for name in dropped)
    trained.load_state_dict({name: value for name, value in state.items() if name not in dropped})
    packed = pack(docs())
    assert torch.equal(
        trained(packed=packed).loss, whole(packed=packed, vision_features=features_of(whole, packed)).loss
    )


def test_dummy_tile_gives_a_trained_tower_exactly_zero_gradient():
    model = tiny_model(train_tower=True).train()
    packed = pack([make_doc(12, [], seed=1)])
    model(packed=packed).loss.backward()
    for module in (model.vision_tower, model.sampler):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_dummy_tile_gives_the_sampler_exactly_zero_gradient():
    model = tiny_model()
    packed = pack([make_doc(12, [], seed=1)])
    assert packed.dummy
    features = features_of(model, packed)
    out = model(packed=packed, vision_features=features)
    out.loss.backward()
    for name, parameter in model.sampler.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert model.decoder.model.embed_tokens.weight.grad.any()
    # Not even a broken feature reaches the loss.
    broken = model(packed=packed, vision_features=torch.full_like(features, float("nan")))
    assert torch.equal(broken.loss, out.loss)


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_every_trainable_parameter_gets_a_gradient(with_images, labels):
    """ZeRO-3 would step one without with the gradient of an earlier step."""
    model = tiny_model()
    packed = pack([make_doc(12, [(2, 1)] if with_images else [], seed=1)])
    if not labels:
        packed.labels.fill_(IGNORE_LABEL)
    model(packed=packed, vision_features=features_of(model, packed)).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert not any(p.requires_grad for p in model.vision_tower.parameters())


def test_a_pack_is_refused_where_documents_would_see_each_other():
    """As where another model is made from the same config object, which sets its own attention there."""
    model = tiny_model()
    model.set_attn_implementation({"text_config": "sdpa"})
    with pytest.raises(ConfigError, match=f"a pack needs the attention {ATTENTION}, and the decoder's is sdpa"):
        model(packed=pack(docs()))


def test_a_trained_tower_gets_the_gradients_of_plain_torch():
    """Each document alone, by transformers' own modules and attention."""
    model = tiny_model(train_tower=True)
    model(packed=pack(docs())).loss.backward()
    found = gradients(model)
    assert found["vision_tower.embeddings.patch_embedding.weight"].abs().max() > 1e-3
    model.zero_grad()
    model.decoder.set_attn_implementation("eager")
    total = torch.zeros(())
    for doc in docs():
        embeds = model.get_input_embeddings()(doc.input_ids)
        if len(doc.tiles):
            features = model.vision_tower(pixel_values=doc.tiles.float() / 127.5 - 1).last_hidden_state
            visual = model.sampler(features, doc.patch_mask)
            embeds = embeds.masked_scatter((doc.input_ids == IMAGE_ID)[:, None], visual)
        hidden = model.decoder.base_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden)[0]
        total += F.cross_entropy(logits[:-1], doc.labels[1:], reduction="sum", ignore_index=IGNORE_LABEL)
    total.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(found[name], grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("every", "train_tower", "recomputed"),
    [
        (1, False, ["sampler.layers.0", "sampler.layers.1", "decoder.model.layers.0", "decoder.model.layers.1"]),
        (2, True, ["vision_tower.encoder.layers.0", "sampler.layers.1", "decoder.model.layers.1"]),
    ],
)
def test_activation_checkpointing_changes_nothing(every, train_tower, recomputed):
    model = tiny_model(train_tower=train_tower).train()
    packed = pack(docs())
    features = None if train_tower else features_of(model, packed)
    calls = Counter()
    for name, module in model.named_modules():
        if re.fullmatch(r".*layers\.\d+", name):
            inner = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
            inner.register_forward_hook(lambda *_, name=name: calls.update([name]))

    def run():
        model.zero_grad()
        calls.clear()
        model(packed=packed, vision_features=features).loss.backward()
        return gradients(model)

    plain = run()
    assert set(calls.values()) == {1}
    model.activation_checkpointing_enable({"use_reentrant": False}, every)
    for name, grad in run().items():
        assert torch.equal(grad, plain[name]), name
    assert [name for name, count in calls.items() if count == 2] == recomputed


def test_wrong_number_of_visual_tokens_is_an_error():
    model = tiny_model()
    packed = pack([make_doc(12, [(2, 1)], seed=1)])
    features = features_of(model, packed)
    packed.visual_token_index = packed.visual_token_index[1:]
    with pytest.raises(PackingError, match="1 images in 3 tiles make 9 visual tokens, but there are 8 places"):
        model(packed=packed, vision_features=features)
    with pytest.raises(PackingError, match="0 images in 0 tiles make 0 visual tokens, but there are 9 places"):
        model(packed.input_ids[None])


@pytest.mark.parametrize("window", [None, 16])
def test_batched_generation_equals_one_by_one(window):
    model = tiny_model(window=window)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

    def new_tokens(rows):
        inputs = left_padded(rows)
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]

    together = new_tokens(prompts())
    alone = torch.cat([new_tokens([prompt]) for prompt in prompts()])
    assert together.shape == (3, 12)
    assert torch.equal(together, alone)
    assert len(set(together[0].tolist())) > 2  # a model that repeats one token proves nothing
    # The images matter: other pixels, other answers.
    inputs = left_padded(prompts())
    inputs["tiles"] = 255 - inputs["tiles"]
    other = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(other[0], together[0])
    assert not torch.equal(other[2], together[2])
    # And so does the cache, against no cache at all.
    without_cache = model.generate(**left_padded(prompts()), **options, use_cache=False)[:, -12:]
    assert torch.equal(without_cache, together)


def test_several_sequences_of_a_prompt_with_images_are_refused():
    model = tiny_model()
    with pytest.raises(ConfigError, match="3 sequences"):
        model.generate(**left_padded([make_doc(5, [(1, 2)], seed=7)]), num_return_sequences=3, do_sample=True)


def test_save_and_load_through_auto_classes(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    packed = pack(docs())
    wanted = model(packed=packed, vision_features=features_of(model, packed)).loss
    for auto in (AutoModel, AutoModelForImageTextToText):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, Blip3ForConditionalGeneration)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.decoder.config._attn_implementation == ATTENTION
        assert torch.equal(loaded(packed=packed, vision_features=features_of(loaded, packed)).loss, wanted)
        assert loaded.generation_config.suppress_tokens == [IMAGE_ID]
        assert loaded.generation_config.eos_token_id == 2
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, loaded.get_buffer(name)), name
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes == {"vision_tower", "sampler", "decoder"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, Blip3Config)
    assert (
        config.layout
        == read_layout(ModelConfig(path=str(tmp_path)))
        == VisualLayout(16, 4, 3, ((1, 2), (2, 1), (2, 2)))
    )
    without = Blip3ForConditionalGeneration(config, with_vision_tower=False)
    assert without.vision_tower is None
    assert not any(name.startswith("vision_tower") for name in without.state_dict())


def test_released_tile_layout_regroups_before_the_sampler():
    crops, released = tiny_model(), tiny_model(tile_layout="released")
    released.load_state_dict(crops.state_dict())
    for grids, same in ([(1, 2)], True), ([(2, 1)], False):
        packed = pack([make_doc(9, grids, seed=3)])
        features = features_of(crops, packed)
        losses = [model(packed=packed, vision_features=features).loss for model in (crops, released)]
        assert torch.equal(*losses) is same


def test_tower_is_frozen_and_in_chunks_gives_the_same():
    model = tiny_model().train()
    assert not model.vision_tower.training
    tiles = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    whole = encode_tiles(model.vision_tower, tiles)
    assert whole.shape == (5, 16, 32)
    assert not whole.requires_grad
    torch.testing.assert_close(encode_tiles(model.vision_tower, tiles, chunk_tiles=2), whole, atol=1e-5, rtol=1e-5)
    pixels = (tiles.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(encode_tiles(model.vision_tower, pixels), whole, atol=1e-5, rtol=1e-5)


def test_tied_embeddings_get_the_gradient_of_both_uses(tmp_path):
    tied, apart = tiny_model(tied=True), tiny_model()
    embeddings, head = "decoder.model.embed_tokens.weight", "decoder.lm_head.weight"
    assert {*dict(apart.named_parameters())} - {*dict(tied.named_parameters())} == {head}
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    apart.load_state_dict(tied.state_dict())
    packed = pack(docs())
    losses = []
    for model in (tied, apart):
        losses.append(model(packed=packed, vision_features=features_of(model, packed)).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    found, wanted = gradients(tied), gradients(apart)
    wanted[embeddings] += wanted.pop(head)
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-5, msg=name)

    tied.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert embeddings in file.keys()  # noqa: SIM118 (it is no mapping)
        assert head not in file.keys()  # noqa: SIM118
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(packed=packed, vision_features=features_of(loaded, packed)).loss, losses[0])


def test_unbuildable_configs_are_refused():
    with pytest.raises(ConfigError, match="the decoder's to say"):
        Blip3ForConditionalGeneration(tiny_config(tie_word_embeddings=True))
    with pytest.raises(ConfigError, match="96 embedding rows and none for id 96"):
        Blip3ForConditionalGeneration(tiny_config(image_token_id=96))
    assert tiny_config().image_token_id == IMAGE_ID
    with pytest.raises(ConfigError, match="96 embedding rows and none for id 96"):
        tiny_model().generate(torch.tensor([[1, 96]]), max_new_tokens=1)


def test_broken_model_folders_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        read_layout(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    with pytest.raises(ConfigError, match="no config of a megablip model"):
        read_layout(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="can't be read"):
        read_layout(ModelConfig(path=str(tmp_path)))


def test_layout_needs_neither_torch_nor_transformers():
    check = "import sys, megablip.model.layout; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_rows_can_be_added(tmp_path):
    """By transformers' way, which makes the head anew."""
    model = tiny_model()
    head = model.get_output_embeddings()
    packed = pack(docs())
    features = features_of(model, packed)
    with torch.no_grad():
        before = model(input_ids=packed.input_ids[None, :12]).logits
    model.resize_token_embeddings(104)
    assert model.config.text_config.vocab_size == 104
    assert model.get_input_embeddings().weight.shape == (104, 48)
    torch.testing.assert_close(model(input_ids=packed.input_ids[None, :12]).logits[..., :96], before)
    assert torch.equal(model.get_output_embeddings().bias[:96], head.bias)
    model(packed=packed, vision_features=features).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 103, 5]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
