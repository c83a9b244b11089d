"""Blocks under torch.compile; needs a C++ compiler on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from megablip.model.compiling import compile_blocks
from tests.distributed import runs

from .tiny import features_of, make_doc, pack, tiny_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_compute_the_same(dtype):
    """Half a minute. Packs of three shapes share their graphs."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = tiny_model().train(), tiny_model().train()
    compile_blocks(compiled.decoder)
    graphs = []
    for seeds in (range(3), range(2), range(5)):
        batch = pack([make_doc(12 + 7 * seed, [(2, 1)] if seed % 2 else [], seed) for seed in seeds])
        found = []
        for model in (plain, compiled):
            model.zero_grad()
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            loss = model(packed=batch, vision_features=features_of(model, batch)).loss
            loss.backward()
            gradients = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])
            found.append((loss.detach(), gradients))
        (loss, gradients), (other, others) = found
        assert float((other - loss).abs() / loss) < (1e-5 if dtype == torch.float32 else 1e-2)
        assert float((others - gradients).norm() / gradients.norm()) < (1e-4 if dtype == torch.float32 else 3e-2)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 2, "before and behind the attention"
    assert graphs[2] == graphs[1], "no graph for every length"


def test_a_run_with_compiled_blocks_has_the_same_losses(work):
    """Two ranks under ZeRO-2; a minute."""
    losses = []
    for compiled in (False, True):
        run_dir = work / f"compiled-{compiled}"
        recipe = runs.make_recipe(work, run_dir=str(run_dir), engine__ds_config="zero2", engine__precision="fp32")
        runs.train(recipe, f"engine.compile_blocks={compiled}")
        losses.append(runs.losses(run_dir))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
