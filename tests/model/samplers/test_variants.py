"""What holds for every kind of sampler, inside the model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megablip.config import ModelConfig
from megablip.errors import ConfigError, PackingError
from megablip.metrics.flops import ModelFlops
from megablip.model.blip3 import Blip3Config
from megablip.model.layout import read_layout
from megablip.model.samplers import SAMPLERS, build_sampler, complete_settings
from tests.metrics.test_flops import ATTENTION
from tests.model.test_blip3 import gradients, left_padded
from tests.model.tiny import Doc, features_of, make_doc, pack

from .variants import INSTRUCTED, KINDS, SETTINGS, USER, chat_doc, prompt_of, variant_model

every_kind = pytest.mark.parametrize("kind", KINDS)
TOKENS = {"perceiver": (3, 0), "fixed": (0, 3), "instruct": (3, 0), "qformer": (3, 0), "mlp": (4, 0)}


def some_docs(model):
    return [
        chat_doc(model, [(2, 1)], seed=1),
        chat_doc(model, [], seed=2),
        chat_doc(model, [(1, 2), (2, 2)], seed=3, question=9),
        chat_doc(model, [(0, 0)], seed=4, question=0),
    ]


def train(model, *packs):
    """Gradients that packs add up to, and their loss."""
    model.zero_grad()
    losses = [model(packed=batch, vision_features=features_of(model, batch)).loss for batch in packs]
    for loss in losses:
        loss.backward()
    return gradients(model), sum(loss.detach() for loss in losses)


def assert_same(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    # Of a gradient that is zero but for rounding (a key's bias) the others give the scale.
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        scale = grad.abs().max().item() + 0.01 * largest
        torch.testing.assert_close(found[name], grad, atol=atol * scale, rtol=1e-5, msg=name)


def test_every_kind_is_tested():
    assert set(SETTINGS) == set(TOKENS) == set(SAMPLERS)


@every_kind
def test_counts_are_one_rule(kind, tmp_path):
    """The same in the config, in what data workers read, and in what the sampler makes."""
    model = variant_model(kind)
    layout = model.config.layout
    assert (layout.tokens_per_tile, layout.tokens_per_image) == TOKENS[kind]
    model.config.save_pretrained(tmp_path)
    assert read_layout(ModelConfig(path=str(tmp_path))) == Blip3Config.from_pretrained(tmp_path).layout == layout
    packed = pack(some_docs(model))
    outputs = []
    model.sampler.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    model(packed=packed, vision_features=features_of(model, packed))
    (visual,) = outputs
    counts = [layout.visual_tokens(grid) for grid in packed.grid.tolist()]
    assert visual.flatten(0, 1).shape == (sum(counts), 48)


@every_kind
def test_packed_equals_documents_alone(kind):
    model = variant_model(kind, window=16)
    docs = some_docs(model)
    together, loss = train(model, pack(docs))
    alone, sum_of_losses = train(model, *[pack([doc]) for doc in docs])
    torch.testing.assert_close(loss, sum_of_losses, atol=0, rtol=1e-6)
    assert_same(together, alone)


@every_kind
def test_a_batch_without_image_calls_the_sampler_once_for_zeros(kind):
    model = variant_model(kind)
    packed, calls = pack([chat_doc(model, [], seed=2), make_doc(9, [], seed=5)]), []
    assert packed.dummy
    model.sampler.register_forward_hook(lambda *_: calls.append(1))
    found, loss = train(model, packed)
    assert len(calls) == 1
    sampler = {name: grad for name, grad in found.items() if name.startswith("sampler.")}
    assert set(sampler) == {f"sampler.{name}" for name, _ in model.sampler.named_parameters()}
    assert not any(grad.any() for grad in sampler.values())
    # What the decoder gets is what it gets without any sampler.
    model.zero_grad()
    plain = 0
    for doc in [chat_doc(model, [], seed=2), make_doc(9, [], seed=5)]:
        alone = model(doc.input_ids[None], labels=doc.labels[None])
        plain = plain + alone.loss * pack([doc]).valid_labels
    plain.backward()
    torch.testing.assert_close(loss, plain.detach())
    for name, parameter in model.decoder.named_parameters():
        torch.testing.assert_close(found[f"decoder.{name}"], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@every_kind
def test_forty_tiles_beside_a_dummy_are_the_same_documents_in_one_batch(kind):
    model = variant_model(kind)
    texts = [chat_doc(model, [], seed=2), chat_doc(model, [], seed=3)]
    images = [chat_doc(model, [(2, 2)] * 4, seed=seed) for seed in (5, 6)]
    with_tiles, without = pack(images), pack(texts)
    assert (len(with_tiles.tiles), without.dummy) == (40, True)
    apart, _ = train(model, with_tiles, without)
    together, _ = train(model, pack([texts[0], *images, texts[1]]))
    assert_same(together, apart)


@every_kind
def test_every_parameter_learns(kind):
    """All but those of the Q-Former's words in its last layer, which nothing reads, get more than zeros."""
    model = variant_model(kind)
    found, _ = train(model, pack(some_docs(model)))
    still = {name for name, grad in found.items() if name.startswith("sampler.") and not grad.any()}
    assert all(name.startswith(("sampler.qformer.encoder.layer.2.intermediate.",
                                "sampler.qformer.encoder.layer.2.output.")) for name in still)  # fmt: skip
    assert bool(still) == (kind == "qformer")
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Without an instruction they get at least zeros.
    unasked, _ = train(model, pack([chat_doc(model, [(2, 1)], seed=1, question=0)]))
    assert unasked.keys() == found.keys()


@every_kind
def test_places_that_do_not_fit_name_the_document(kind):
    model = variant_model(kind)
    packed = pack(some_docs(model))
    packed.keys = ["one", "two", "three", "four"]
    features = features_of(model, packed)
    kept = torch.ones(len(packed.visual_token_index), dtype=torch.bool)
    kept[-model.config.layout.visual_tokens((0, 0)) - 1] = False  # one of the third document
    packed.visual_token_index = packed.visual_token_index[kept]
    with pytest.raises(PackingError, match="document three"):
        model(packed=packed, vision_features=features)
    rows = left_padded([prompt_of(doc) for doc in some_docs(model)])
    rows["input_ids"][3, -4:] = 90
    with pytest.raises(PackingError, match="row 3 of the batch"):
        model(**rows)


@every_kind
def test_batched_generation_equals_one_by_one(kind):
    model = variant_model(kind, window=16)
    prompts = [prompt_of(doc) for doc in some_docs(model)]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

    def new_tokens(rows, **more):
        inputs = left_padded(rows)
        return model.generate(**inputs, **options, **more)[:, inputs["input_ids"].shape[1] :]

    together = new_tokens(prompts)
    assert torch.equal(together, torch.cat([new_tokens([prompt]) for prompt in prompts]))
    assert torch.equal(together, new_tokens(prompts, use_cache=False))
    changed = [Doc(d.input_ids, d.labels, d.grids, 255 - d.tiles, d.patch_mask) for d in prompts]
    assert not torch.equal(together[2], new_tokens(changed)[2])


@every_kind
def test_training_and_inference_see_the_same(kind):
    model = variant_model(kind, window=16)
    docs = some_docs(model)
    packed = pack(docs)
    out = model(packed=packed, vision_features=features_of(model, packed))
    for number, doc in enumerate(docs):
        alone = model(**left_padded([doc]), labels=doc.labels[None])
        torch.testing.assert_close(
            out.document_loss[number] / out.document_labels[number], alone.loss, atol=1e-5, rtol=1e-5
        )


@every_kind
def test_flops_are_what_torch_counts(kind):
    model = variant_model(kind)
    docs = [chat_doc(model, [(2, 1)], 0, question=0), chat_doc(model, [(1, 2), (2, 2)], 2, question=0)]
    batch = pack(docs)
    batch.patch_mask[:] = True  # the Perceiver leaves out patches that show no image, and FLOPs count them
    features = features_of(model, batch)
    calls = []
    model.sampler.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    model(packed=batch, vision_features=features)
    ((inputs, _),) = calls
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        model.sampler(*inputs)
    flops = model.sampler.flops(16)
    expected = flops.per_tile * len(batch.tiles) + flops.per_image * len(batch.grid)
    # Padded tiles of the fixed sampler and the one padded word of an instruction are work, but not FLOPs.
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.3 if kind in ("fixed", *INSTRUCTED) else 0.001)
    whole = ModelFlops.of(model, model.vision_tower, model.config)
    assert whole.per_image == 3 * flops.per_image
    model.vision_tower.requires_grad_(True)
    assert ModelFlops.of(model, model.vision_tower, model.config).per_tile >= whole.per_tile + flops.of_features


@every_kind
def test_full_size_builds(kind):
    config = Blip3Config(sampler={"kind": kind})
    with torch.device("meta"):
        sampler = build_sampler(config)
    layout = config.layout
    wanted = {"perceiver": 128 * 5, "fixed": 128, "instruct": 128 * 5, "qformer": 32 * 5, "mlp": 14 * 14 * 5}[kind]
    assert layout.visual_tokens((2, 2)) == wanted
    assert sum(parameter.numel() for parameter in sampler.parameters()) > 1e7


def test_settings_are_completed():
    assert complete_settings({}) == {
        "kind": "perceiver", "depth": 6, "heads": 16, "dim_head": 96, "num_latents": 128, "ff_mult": 4,
    }  # fmt: skip
    assert complete_settings({"kind": "fixed", "num_latents": 256})["num_latents"] == 256
    assert complete_settings({"kind": "mlp"}) == {"kind": "mlp"}


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"kind": "perciever"}, "unknown kind 'perciever'; did you mean 'perceiver'"),
        ({"kind": "zzz"}, "known: fixed, instruct, mlp, perceiver, qformer"),
        ({"num_latent": 3}, "kind 'perceiver' has no 'num_latent'; did you mean 'num_latents'"),
        ({"kind": "qformer", "num_latents": 3}, "kind 'qformer' has no 'num_latents'"),
        ({"kind": "mlp", "depth": 3}, "kind 'mlp' has no 'depth'"),
        ({"depth": 0}, "0 is no whole number from 1 on"),
        ({"depth": "6"}, "'6' is no whole number"),
        ({"depth": True}, "True is no whole number"),
    ],
)
def test_wrong_settings_are_refused(sampler, message):
    with pytest.raises(ConfigError, match=message):
        Blip3Config(sampler=sampler)


def test_counts_that_do_not_follow_from_the_sampler_are_refused():
    with pytest.raises(ConfigError, match="leave visual_tokens as it was saved"):
        Blip3Config(sampler={"kind": "fixed"}, visual_tokens={"per_tile": 128, "per_image": 0})


@pytest.mark.parametrize("kind", INSTRUCTED)
def test_instructions_need_the_tokens_of_turns(kind):
    config = variant_model(kind).config
    config.user_turn_ids = None
    with pytest.raises(ConfigError, match=f"'{kind}' reads the user's turns"):
        config.check()
    config.user_turn_ids = [USER]
    config.check()


def test_an_mlp_needs_whole_crops():
    with pytest.raises(ConfigError, match="needs whole crops"):
        variant_model("mlp", tile_layout="released")
