"""The states of torch's generators."""

from __future__ import annotations

import torch

from megablip.engine.rng import restore_rng, rng_states


def test_they_are_set_again():
    states = rng_states()
    drawn = torch.rand(3)
    restore_rng(states)
    assert torch.equal(torch.rand(3), drawn)


def test_a_gpu_that_a_run_does_not_use_is_left_alone(monkeypatch):
    """Of a run on the CPU (DS_ACCELERATOR=cpu) each rank once made a context there, at its first save."""

    def touched(*_):
        raise AssertionError("the GPU is touched")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", touched)
    monkeypatch.setattr("torch.cuda.set_rng_state", touched)
    states = rng_states()
    assert list(states) == ["cpu"]
    restore_rng(states | {"cuda": torch.zeros(16, dtype=torch.uint8)})
