"""Random packs through the whole model: what a document gives does not depend on its neighbours."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megablip.model.attention import use_backend
from megablip.model.blip3 import Blip3ForConditionalGeneration
from megablip.records import MicroBatch
from tests.model.stand_ins import BACKENDS, EXACT, running_on
from tests.model.tiny import IMAGE_ID, Doc, make_doc, pack, tiny_config

GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2)]
FEW, ALL = 6, 200
"""Packs of a fast test, and of a slow one."""


def model_of(dtype: torch.dtype = torch.float32) -> Blip3ForConditionalGeneration:
    """Three query heads to a key head, of size 8, which all kernels take; a sliding window of 16."""
    config = tiny_config(window=16)
    config.text_config.num_attention_heads = 6
    torch.manual_seed(0)
    model = Blip3ForConditionalGeneration(config, with_vision_tower=False).train()
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    return model


def random_docs(seed: int) -> list[Doc]:
    """One to six documents of 2 to 60 tokens of text, with up to two images each."""
    rng = np.random.default_rng(seed)
    docs = []
    for number in range(rng.integers(1, 7)):
        grids = [GRIDS[pick] for pick in rng.integers(0, len(GRIDS), rng.choice([0, 1, 2], p=[0.4, 0.4, 0.2]))]
        docs.append(make_doc(int(rng.integers(2, 60)), grids, seed=seed * 10 + number))
    return docs


def another(doc: Doc, seed: int) -> Doc:
    """One of the same length whose images have the same grids and padding, with other text, labels and pixels.

    Other lengths would change the shapes of matrix products, and so how they round.
    """
    other = make_doc(int((doc.input_ids != IMAGE_ID).sum()), doc.grids, seed)
    return replace(other, patch_mask=doc.patch_mask)


def features_of(batch: MicroBatch) -> torch.Tensor:
    """[N, 16, 32], each tile's own, told from its pixels."""
    return torch.stack(
        [torch.randn(16, 32, generator=torch.Generator().manual_seed(int(t.sum()))) for t in batch.tiles]
    )


def logits_of(model: Blip3ForConditionalGeneration, docs: list[Doc]) -> tuple[torch.Tensor, ...]:
    batch = pack(docs)
    with torch.no_grad():
        hidden, _ = model.packed_hidden_states(batch, features_of(batch).to(model.sampler.latents.dtype))
        return model.get_output_embeddings()(hidden).split(batch.doc_lens)


def check_leakage(backend: str, packs: range, dtype: torch.dtype = torch.float32) -> None:
    model = model_of(dtype)
    with running_on(backend):
        for seed in packs:
            docs = random_docs(seed)
            changed = seed % len(docs)
            before = logits_of(model, docs)
            docs[changed] = another(docs[changed], seed=10_000 + seed)
            after = logits_of(model, docs)
            for number, (old, new) in enumerate(zip(before, after, strict=True)):
                difference = float((old - new).abs().max())
                if number == changed:
                    assert difference > 1e-3, f"pack {seed}: the document that changed gives the same"
                else:
                    limit = 0.0 if backend in EXACT else 1e-6
                    assert difference <= limit, f"pack {seed}: {number} moves by {difference} with {changed}"


def gradients_of(model: Blip3ForConditionalGeneration, docs: list[Doc]) -> tuple[float, dict[str, torch.Tensor]]:
    batch = pack(docs)
    model.zero_grad()
    loss = model(packed=batch, vision_features=features_of(batch)).loss
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def check_alone(backend: str, packs: range) -> None:
    model = model_of()
    with running_on(backend):
        for seed in packs:
            docs = random_docs(seed)
            loss, gradients = gradients_of(model, docs)
            alone = [gradients_of(model, [doc]) for doc in docs]
            total = sum(value for value, _ in alone)
            assert abs(loss - total) <= 1e-6 * max(abs(total), 1.0), f"pack {seed}"
            for name, gradient in gradients.items():
                wanted = sum(found[name] for _, found in alone)
                scale = max(float(wanted.abs().max()), 1.0)
                assert float((gradient - wanted).abs().max()) <= 1e-5 * scale, f"pack {seed}: {name}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_that_changes_moves_no_other(backend):
    check_leakage(backend, range(FEW))


def test_nor_in_bf16_where_matrix_products_serve_it():
    check_leakage("per_document", range(FEW), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients_are_those_of_the_documents_alone(backend):
    check_alone(backend, range(FEW // 2))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_200_packs_none_leaks(backend):
    """Ten seconds at most for each backend."""
    check_leakage(backend, range(ALL))
    if backend == "per_document":
        check_leakage(backend, range(ALL), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_200_packs_train_as_their_documents_alone(backend):
    """Half a minute at most for each backend."""
    check_alone(backend, range(ALL))


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_mode_gives_the_same_bits(backend, dtype):
    model = model_of(dtype)
    batch = pack([*random_docs(1), make_doc(700, [(2, 2)], seed=7)])  # one that goes by SDPA also in bf16
    features = features_of(batch).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    torch.use_deterministic_algorithms(True)
    try:
        with running_on(backend):
            runs = []
            for _ in range(2):
                model.zero_grad()
                losses = model(packed=batch, vision_features=features)
                losses.loss.backward()
                gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                runs.append([losses.loss.detach(), losses.document_loss, *gradients])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert len(runs[0]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("tile_layout", ["crops", "released"])
def test_nothing_is_read_from_the_device_on_the_way_to_the_hidden_states(tile_layout):
    """On the meta device there is nothing to read: .item(), .tolist() and nonzero() are errors there."""
    config = tiny_config(window=16, tile_layout=tile_layout)
    config.text_config.num_attention_heads = 6
    with torch.device("meta"):
        model = Blip3ForConditionalGeneration(config, with_vision_tower=False).train()
    batch = pack([make_doc(20, [(2, 2)], 0), make_doc(9, [], 1), make_doc(5, [(1, 1), (2, 1)], 2)]).to("meta")
    assert batch.input_ids.is_meta
    features = torch.empty(*batch.patch_mask.shape, 32, device="meta")
    use_backend("torch_varlen")  # the real one: its kernel is registered for this device too
    try:
        hidden, _ = model.packed_hidden_states(batch, features)
        hidden.sum().backward()
    finally:
        use_backend(None)
    assert hidden.shape == (len(batch.input_ids), 48)
    assert model.sampler.latents.grad.shape == model.sampler.latents.shape
