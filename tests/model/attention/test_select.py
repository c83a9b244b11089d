"""Which kernel is taken, on machines that are made up, and why others are not."""

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, Phi3Config, Qwen3Config

from megablip.errors import ConfigError
from megablip.model.attention import head_sizes, interface, select, select_backend, use_backend, varlen_attention
from megablip.model.packing import PackedLayout
from tests.model import stand_ins

HALF = torch.bfloat16


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU: its compute capability, and which packages there are; kernels are stand-ins."""
    has = SimpleNamespace(capability=(9, 0), modules=set(), flash_attn=None, activated=[])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: has.capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(select, "_version", lambda package: has.flash_attn and Version(has.flash_attn))
    monkeypatch.setattr(
        select, "_is_importable", lambda module: module == "torch.nn.attention.varlen" or module in has.modules
    )
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", has.activated.append)
    monkeypatch.setattr("torch.nn.attention.restore_flash_attention_impl", lambda: has.activated.append("restored"))
    few = select._few_tokens
    monkeypatch.setattr(select, "_few_tokens", lambda needs, size: few(needs._replace(device_type="cpu"), size))
    stand_ins.install(monkeypatch, [])
    return has


def test_a_cpu_has_one_way():
    found = select_backend("cpu", HALF)
    assert found.name == "per_document"
    assert str(found).count("it needs a CUDA device, not cpu") == 1, "one reason is said once"
    assert [kernel.split()[-1] for kernel, _ in found.passed_over][:2] == ["FA3", "FA4"]
    assert select_backend("cpu", HALF, wanted="dense").name == "dense"


def test_without_any_package_torchs_own_kernel_runs(machine):
    found = select_backend("cuda", HALF, (96,))
    assert found.name == "torch_varlen"
    assert ("flash-attn 2", "flash-attn is not installed") in found.passed_over
    assert "flash_attn_interface is not installed" in str(found)
    assert machine.activated == []


@pytest.mark.parametrize(("version", "name"), [("2.8.3.post1", "flash_attn"), ("2.6.3", "torch_varlen")])
def test_flash_attn_comes_before_it_from_2_7_on(machine, version, name):
    machine.flash_attn = version
    found = select_backend("cuda", HALF, (96,))
    assert found.name == name
    assert version in str(found)


@pytest.mark.parametrize(("capability", "taken"), [((8, 0), None), ((9, 0), "FA3"), ((10, 0), "FA4"), ((12, 0), None)])
def test_newer_flash_attn_where_it_is_made_for(machine, capability, taken):
    machine.capability, machine.flash_attn = capability, "2.8.3"
    machine.modules = {"flash_attn_interface", "flash_attn.cute.interface"}
    found = select_backend("cuda", HALF, (96,))
    assert found.name == ("torch_varlen" if taken else "flash_attn")
    assert machine.activated == ([taken] if taken else [])
    assert taken is None or found.kernel.endswith(taken)


@pytest.mark.parametrize(
    ("capability", "dtype", "heads", "reason"),
    [
        ((7, 5), HALF, (96,), "compute capability 8.0 (Ampere), not 7.5"),
        ((9, 0), torch.float32, (96,), "bf16 and fp16, not float32"),
        ((9, 0), HALF, (96, 100), "head sizes up to 256 in steps of 8, not 100"),
        ((9, 0), HALF, (288,), "not 288"),
    ],
)
def test_what_no_kernel_takes_goes_by_documents(machine, capability, dtype, heads, reason):
    machine.capability, machine.flash_attn = capability, "2.8.3"
    found = select_backend("cuda", dtype, heads)
    assert found.name == "per_document"
    assert reason in str(found)
    for wanted in ("flash_attn", "torch_varlen"):
        with pytest.raises(ConfigError, match=wanted) as error:
            select_backend("cuda", dtype, heads, wanted)
        assert reason in str(error.value)
        assert "model.attention" in str(error.value)


def test_a_kernel_that_fails_when_tried_is_passed_over(machine, monkeypatch):
    """As torch 2.13 with a flash-attn 4 of another month, or a package built for another torch."""
    machine.modules = {"flash_attn_interface"}

    def broken(**options):
        if machine.activated == ["FA3"]:
            raise ValueError("too many values to unpack")
        return stand_ins._torch_varlen(**options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", broken)
    found = select_backend("cuda", HALF, (96,))
    assert found.name == "torch_varlen"
    assert not found.kernel.endswith("FA3")
    assert "it fails here (ValueError: too many values to unpack)" in str(found)
    assert machine.activated == ["FA3", "restored"]


def test_a_kernel_that_mixes_documents_is_passed_over(machine, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, **_: query.mean(0).expand_as(query))
    found = select_backend("cuda", HALF)
    assert found.name == "per_document"
    assert "its result is wrong" in str(found)


def test_the_backend_in_use_is_the_one_asked_for(monkeypatch):
    layout, x = PackedLayout.from_lengths([3, 4]), torch.randn(7, 2, 8)
    used = []
    for name in ("per_document", "dense"):
        backend = interface.BACKENDS[name]
        monkeypatch.setitem(
            interface.BACKENDS, name, lambda *a, _n=name, _b=backend, **o: used.append(_n) or _b(*a, **o)
        )
    for name in ("dense", None, "per_document"):
        use_backend(name)
        varlen_attention(x, x, x, layout_q=layout, layout_k=layout, causal=True)
    use_backend(None)
    assert used == ["dense", "per_document", "per_document"]


def test_head_sizes_of_decoder_and_sampler():
    assert set(head_sizes(Phi3Config(), {"dim_head": 96})) == {96}
    assert set(head_sizes(LlamaConfig(), {"dim_head": 96})) == {128, 96}
    assert set(head_sizes(Qwen3Config(hidden_size=2560, num_attention_heads=32, head_dim=128), {})) == {128}


def test_the_trial_is_apart_from_where_attention_is_first_called(machine):
    """In a checkpointed block, whose kept tensors are counted, and without gradients."""
    weight, found = torch.ones((), requires_grad=True), []

    def block(x):
        if not found:
            found.append(select_backend("cuda", HALF, (96,)).name)
        return (x * weight).sin()

    checkpoint(block, torch.ones(3), use_reentrant=False).sum().backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found.append(select_backend("cuda", HALF, (96,)).name)
    assert found == ["torch_varlen"] * 3
