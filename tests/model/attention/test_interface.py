"""Every backend through the one call, against attention that is written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Phi3Config, Phi3ForCausalLM

from megablip.errors import ConfigError
from megablip.model.attention import ATTENTION, varlen_attention
from megablip.model.packing import PackedLayout
from tests.model.stand_ins import BACKENDS, reference, running_on
from tests.model.tiny import tiny_model


def inputs(heads, tokens, kv_tokens=None, dim=8, dtype=torch.float32):
    """[tokens, heads, dim] as transformers hands them over: transposed views."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads[0], tokens), (heads[1], kv_tokens or tokens), (heads[1], kv_tokens or tokens))
    made = (torch.randn(n, count, dim, generator=generator) for n, count in shapes)
    return [x.to(dtype).requires_grad_() for x in made]


def run(function, tensors):
    """Output and gradients, under a fixed random cotangent."""
    out = function(*(x.transpose(0, 1) for x in tensors))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, tensors, cotangent.to(out.dtype))
    return [x.detach().float() for x in (out, *grads)]


def compare(ours, wanted, **tolerance):
    for got, right in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, right, **tolerance or {"atol": 2e-5, "rtol": 1e-5})


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(
    doc_lens=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 16, 40]),
)
def test_self_attention_equals_the_reference(backend, doc_lens, heads, window):
    layout = PackedLayout.from_lengths(doc_lens)
    tensors = inputs(heads, sum(doc_lens))
    with running_on(backend):
        ours = run(
            lambda q, k, v: varlen_attention(
                q, k, v, layout_q=layout, layout_k=layout, causal=True, scale=0.3, window=window
            ),
            tensors,
        )
    left = -1 if window is None else window - 1
    compare(ours, run(lambda *x: reference(*x, doc_lens, scale=0.3, left=left, right=0), tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([3, 3, 3], [7, 7, 7]),  # tiles without padding: a plain batch
        ([3, 3, 3], [7, 3, 19]),  # tiles that show their image in part
        ([7, 20, 1], [7, 20, 1]),
    ],
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_that_is_not_causal(backend, lengths_q, lengths_k, heads):
    layout_q, layout_k = PackedLayout.from_lengths(lengths_q), PackedLayout.from_lengths(lengths_k)
    tensors = inputs(heads, sum(lengths_q), sum(lengths_k))
    with running_on(backend):
        ours = run(
            lambda q, k, v: varlen_attention(q, k, v, layout_q=layout_q, layout_k=layout_k, causal=False), tensors
        )
    compare(ours, run(lambda *x: reference(*x, lengths_q, lengths_k, scale=8**-0.5), tensors))


@pytest.mark.parametrize("dim", [64, 72, 96, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_sizes_in_use(backend, dim):
    """Phi-3 and the sampler 96, SigLIP 72, Llama and Qwen 64 and 128."""
    layout = PackedLayout.from_lengths([9, 33])
    tensors = inputs((4, 2), 42, dim=dim)
    with running_on(backend):
        ours = run(lambda q, k, v: varlen_attention(q, k, v, layout_q=layout, layout_k=layout, causal=True), tensors)
    compare(ours, run(lambda *x: reference(*x, [9, 33], scale=dim**-0.5, right=0), tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_kernels_differ_in_is_refused(backend):
    layout, other = PackedLayout.from_lengths([4]), PackedLayout.from_lengths([6])
    q, k = torch.randn(4, 2, 8), torch.randn(6, 2, 8)
    with running_on(backend):
        with pytest.raises(ValueError, match="one layout"):
            varlen_attention(q, k, k, layout_q=layout, layout_k=other, causal=True)
        with pytest.raises(ValueError, match="window"):
            varlen_attention(q, q, q, layout_q=layout, layout_k=layout, causal=False, window=3)


# --- Through transformers -------------------------------------------------------------


def phi3(attention, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Phi3Config(vocab_size=40, pad_token_id=0, initializer_range=0.3, **sizes, **config)
    return Phi3ForCausalLM._from_config(config, attn_implementation=attention).eval()


def packed_logits(model, ids, doc_lens):
    layout = PackedLayout.from_lengths(doc_lens)
    positions = torch.cat([torch.arange(length) for length in doc_lens])[None]
    # A mask of four dimensions: transformers takes it for finished and makes none.
    with torch.no_grad():
        return model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=torch.ones(1, 1, 1, 1),
            packing=layout,
            use_cache=False,
        ).logits


@pytest.mark.parametrize("theirs", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_window_is_that_of_transformers(backend, theirs):
    doc_lens = [5, 24, 11]
    ids = torch.randint(1, 40, (1, sum(doc_lens)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in doc_lens])[None]
    with torch.no_grad():
        wanted = phi3(theirs, sliding_window=7)(input_ids=ids, position_ids=positions, use_cache=False).logits
    with running_on(backend):
        ours = packed_logits(phi3(ATTENTION, sliding_window=7), ids, doc_lens)
        without = packed_logits(phi3(ATTENTION, sliding_window=None), ids, doc_lens)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    assert (without - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("backend", ["per_document", "flash_attn", "torch_varlen"])
def test_window_of_phi_3_in_a_document_of_3000_tokens(backend):
    ids = torch.randint(1, 40, (1, 3010), generator=torch.Generator().manual_seed(0))
    model = phi3(ATTENTION, sliding_window=2047)
    with torch.no_grad():
        wanted = phi3("sdpa", sliding_window=2047)(input_ids=ids[:, 10:], use_cache=False).logits
    with running_on(backend):
        ours = packed_logits(model, ids, [10, 3000])[:, 10:]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        full = phi3("sdpa", sliding_window=None)(input_ids=ids[:, 10:], use_cache=False).logits
    assert (full - wanted)[:, :2047].abs().max() < 1e-4
    assert (full - wanted)[:, 2047:].abs().max() > 1e-2


def test_documents_told_apart_by_position_ids_alone_are_isolated_too():
    """transformers' own convention for packs, without `packing`: as under its SDPA."""
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    together = model.decoder(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = model.decoder(input_ids=ids[:, 3:], use_cache=False).logits
    torch.testing.assert_close(together[:, 3:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_left_padding_and_a_cache(window):
    """Without `packing`: as under transformers' SDPA, forward and step by step."""
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    logits, tokens = [], []
    for attention in (ATTENTION, "sdpa"):
        model = phi3(attention, sliding_window=window)
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
        tokens.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
    torch.testing.assert_close(*logits)
    assert torch.equal(*tokens)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": torch.zeros(2)}])
def test_attention_with_more_to_it_is_refused(options):
    from megablip.model.attention.interface import _attention_interface

    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ConfigError, match="attention has"):
        _attention_interface(torch.nn.Identity(), x, x, x, None, packing=PackedLayout.from_lengths([4]), **options)
