"""Decoders of other families than Phi-3, and which ones are refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Gemma2Config, GraniteConfig, LlamaConfig, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megablip.errors import ConfigError
from megablip.model.attention import ATTENTION
from megablip.model.decoder import build_decoder, check_attention

from .tiny import IMAGE_ID, PAD_ID, VOCABULARY, docs, features_of, gradients, left_padded, pack, prompts, tiny_model

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def phi3():
    return AutoConfig.for_model("phi3", **SIZES, sliding_window=16)


def llama():
    return LlamaConfig(**SIZES, attention_bias=True)


def qwen3():
    """Heads wider than hidden_size / heads, norms on queries and keys, and a window in one layer of two."""
    kinds = ["sliding_attention", "full_attention"]
    return Qwen3Config(**SIZES, head_dim=16, use_sliding_window=True, sliding_window=8, layer_types=kinds)


def stablelm():
    """Its layers hand only what they know to the attention."""
    return AutoConfig.for_model("stablelm", **SIZES, partial_rotary_factor=0.5)


FAMILIES = [phi3, llama, qwen3]

# What older configs call their sizes.
OTHER_NAMES = {"n_layer": 2, "n_head": 4, "n_embd": 48, "n_positions": 512, "n_inner": 64, "dff": 64, "head_dim": 12}
ACCEPTED = set()


@pytest.fixture(params=FAMILIES, ids=lambda make: make.__name__)
def model(request):
    return tiny_model(text=request.param())


def test_packed_equals_documents_alone(model):
    check_attention(model.config.text_config)
    packed, positions = pack(docs()), []
    model.decoder.base_model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    out = model(packed=packed, vision_features=features_of(model, packed))
    out.loss.backward()
    assert torch.equal(positions[0], packed.position_ids[None])  # restart at each document
    together = gradients(model)
    model.zero_grad()
    for number, doc in enumerate(docs()):
        alone = pack([doc])
        single = model(packed=alone, vision_features=features_of(model, alone))
        single.loss.backward()
        torch.testing.assert_close(out.document_loss[number], single.loss.detach(), atol=0, rtol=1e-6)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(together[name], grad, atol=1e-5 * grad.abs().max().item(), rtol=1e-5, msg=name)
    # And through transformers' own attention, unpacked, its own loss.
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


def test_generation_in_a_batch_equals_one_by_one(model):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

    def new_tokens(rows, **more):
        inputs = left_padded(rows)
        return model.generate(**inputs, **options, **more)[:, inputs["input_ids"].shape[1] :]

    together = new_tokens(prompts())
    alone = torch.cat([new_tokens([prompt]) for prompt in prompts()])
    assert together.shape == (3, 12)
    assert torch.equal(together, alone)
    assert len(set(together[0].tolist())) > 2  # a model that repeats one token proves nothing
    assert torch.equal(new_tokens(prompts(), use_cache=False), together)


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.decoder.config._attn_implementation == ATTENTION
    assert type(loaded.decoder) is type(model.decoder)
    packed = pack(docs())
    features = features_of(model, packed)
    with torch.no_grad():
        wanted, found = (m(packed=packed, vision_features=features).loss for m in (model, loaded))
    assert torch.equal(wanted, found)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    for name, buffer in model.named_buffers():  # positions in bf16 would be wrong from the 256th token on
        assert torch.equal(buffer, loaded.get_buffer(name)), name
        assert torch.equal(buffer, half.get_buffer(name)), name


def test_sampling(model):
    inputs = left_padded(prompts())

    def sampled(**options):
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, **options)[
            :, inputs["input_ids"].shape[1] :
        ]

    hot = sampled(do_sample=True, temperature=2.0)
    assert torch.equal(hot, sampled(do_sample=True, temperature=2.0))
    assert not torch.equal(hot, sampled(do_sample=True, temperature=1.0))
    assert torch.equal(sampled(do_sample=True, top_k=1), sampled(do_sample=False))
    assert not (hot == IMAGE_ID).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(**SIZES), "logits are more than its output head"),
        (GraniteConfig(**SIZES, logits_scaling=8.0), "logits are more than its output head"),
        (LlamaConfig(**SIZES, attention_dropout=0.1), "attention_dropout is 0.1"),
        (AutoConfig.for_model("mixtral", **SIZES), "it has experts"),
        (AutoConfig.for_model("opt", **{**SIZES, "attention_dropout": 0.0}), "calls its base model in its own way"),
        (AutoConfig.for_model("mamba", hidden_size=8, num_hidden_layers=1), "state past a document's end"),
        (AutoConfig.for_model("lfm2", **SIZES, layer_types=["conv", "full_attention"]), "layers of conv carry state"),
        (AutoConfig.for_model("gptj"), "megablip_varlen"),
        (AutoConfig.for_model("t5"), "Unrecognized configuration class"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_decoders_that_would_be_wrong_are_refused(config, message):
    config.tie_word_embeddings = False
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build_decoder(config, head_bias=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AutoConfig.for_model("stablelm", **SIZES, partial_rotary_factor=0.5),
            "0 of its 2 layers tell the attention where documents end",
        ),
        (AutoConfig.for_model("granite_swa", **SIZES), "s_aux"),
        (AutoConfig.for_model("diffllama", **SIZES), "4 of its 2 layers"),
        (AutoConfig.for_model("moshi", **SIZES), "layer 0 has the window None, its config says 3000"),
        (AutoConfig.for_model("bloom", hidden_size=48, n_layer=1, n_head=4), "doesn't take packed documents"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_attentions_that_would_be_wrong_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        check_attention(config)


def test_what_gets_past_the_start_fails_in_the_first_step():
    """A layer that keeps the layout to itself would see all documents at once."""
    model = tiny_model(text=stablelm())
    packed = pack(docs())
    with pytest.raises(ConfigError, match="attends without knowing where documents end"):
        model(packed=packed, vision_features=features_of(model, packed))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family_is_right_or_refused(family):
    """All of transformers' causal language models: packed documents equal documents alone.  Two minutes."""
    try:
        text = AutoConfig.for_model(family, **OTHER_NAMES | SIZES)
    except Exception as error:
        pytest.skip(f"takes other sizes: {error}")
    try:
        with torch.device("meta"):
            decoder = build_decoder(text, head_bias=True)
        check_attention(text)
    except ConfigError:
        return
    if decoder.num_parameters() > 10**7:
        pytest.skip("parts of it beside the decoder are large")
    model = tiny_model(text=text)
    packed = pack(docs())
    with torch.no_grad():
        out = model(packed=packed, vision_features=features_of(model, packed))
        for number, doc in enumerate(docs()):
            alone = pack([doc])
            single = model(packed=alone, vision_features=features_of(model, alone))
            torch.testing.assert_close(out.document_loss[number], single.loss, atol=1e-5, rtol=1e-5)
    ACCEPTED.add(family)


@pytest.mark.slow
def test_the_families_that_are_accepted():
    """After the test above, in one process."""
    assert {"llama", "qwen2", "qwen3", "phi3", "mistral", "gemma", "gemma3_text", "olmo2", "smollm3"} <= ACCEPTED
