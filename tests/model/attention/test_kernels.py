"""Adapters of GPU kernels, without a GPU; what they compute is tested with all backends in test_interface.py."""

import importlib
import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megablip.model.attention import use_backend, varlen_attention
from megablip.model.packing import PackedLayout
from tests.model.stand_ins import SIGNATURES, bind, running_on


@pytest.fixture
def on_torch():
    use_backend("torch_varlen")
    yield
    use_backend(None)


@pytest.mark.parametrize("function", SIGNATURES)
def test_the_signatures_are_those_of_what_is_installed(function):
    """torch always is; flash-attn where there is a GPU."""
    module, _, name = function.rpartition(".")
    package = pytest.importorskip(module.partition(".")[0])
    release = package.__version__.split("+")[0]
    found = []
    for parameter in inspect.signature(getattr(importlib.import_module(module), name)).parameters.values():
        entry = {"name": parameter.name}
        if parameter.kind is parameter.KEYWORD_ONLY:
            entry["keyword_only"] = True
        if parameter.default is not parameter.empty:
            entry["default"] = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        found.append(entry)
    assert found == SIGNATURES[function][-1]["parameters"], f"{function} of {release} has another signature"


def test_a_signature_refuses_what_its_package_would():
    name = "flash_attn.flash_attn_varlen_func"
    right = dict.fromkeys(["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"])
    bind(name, (), right)
    with pytest.raises(TypeError, match="scale"):
        bind(name, (), right | {"scale": 1.0})
    with pytest.raises(TypeError, match="max_seqlen_k"):
        bind(name, (), {key: None for key in right if key != "max_seqlen_k"})
    with pytest.raises(AssertionError, match="by position"):
        bind(name, (None,), {key: None for key in right if key != "q"})


@pytest.mark.parametrize("wanted", [False, True])
def test_flash_attn_is_told_of_deterministic_mode(wanted):
    layout, x = PackedLayout.from_lengths([4]), torch.randn(4, 2, 8)
    torch.use_deterministic_algorithms(wanted)
    try:
        with running_on("flash_attn") as calls:
            varlen_attention(x, x, x, layout_q=layout, layout_k=layout, causal=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in calls] == [wanted]


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen"])
def test_a_transposed_view_is_not_copied_and_a_strided_one_is(backend):
    layout = PackedLayout.from_lengths([4, 5])
    view = torch.randn(2, 9, 8).transpose(0, 1)
    strided = torch.randn(9, 8, 2).transpose(1, 2)
    with running_on(backend) as calls:
        varlen_attention(view, view, strided, layout_q=layout, layout_k=layout, causal=True)
    given = list(calls[0].values())
    assert given[0].data_ptr() == view.data_ptr()
    assert given[2].data_ptr() != strided.data_ptr()


# Autograd has no queue for a device that is not there, so backward goes over fake CPU tensors.
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 32, 96), (8, 2, 128), (4, 4, 64)])
@pytest.mark.parametrize("window", [None, 2047])
def test_torchs_own_kernel_takes_the_call(on_torch, heads, kv_heads, dim, window, device):
    """The real varlen_attn on fake tensors: nothing computes, and all of its checks run."""
    with FakeTensorMode():
        layout = PackedLayout([3000, 96], torch.empty(3, dtype=torch.int32, device=device))
        q, k, v = (
            torch.empty(n, 3096, dim, dtype=torch.bfloat16, device=device, requires_grad=device == "cpu")
            for n in (heads, kv_heads, kv_heads)
        )
        views = (x.transpose(0, 1) for x in (q, k, v))
        out = varlen_attention(*views, layout_q=layout, layout_k=layout, causal=True, window=window)
        assert (out.shape, out.dtype, out.device.type) == ((3096, heads, dim), torch.bfloat16, device)
        if device == "cpu":
            out.sum().backward()
            assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


def test_torchs_own_kernel_takes_the_samplers_call(on_torch):
    with FakeTensorMode():
        layout_q = PackedLayout([128] * 3, torch.empty(4, dtype=torch.int32))
        layout_k = PackedLayout([857, 500, 128], torch.empty(4, dtype=torch.int32))
        q = torch.empty(384, 16, 96, dtype=torch.bfloat16, requires_grad=True)
        kv = torch.empty(1485, 2, 16, 96, dtype=torch.bfloat16, requires_grad=True)
        out = varlen_attention(q, *kv.unbind(1), layout_q=layout_q, layout_k=layout_k, causal=False)
        out.sum().backward()
    assert out.shape == q.shape
    assert kv.grad.shape == kv.shape


def test_torch_2_11_is_not_told_of_grouped_queries(monkeypatch):
    monkeypatch.setattr("megablip.model.attention.kernels._ASKS_FOR_GROUPS", False)
    layout, x = PackedLayout.from_lengths([4]), torch.randn(4, 2, 8)
    with running_on("torch_varlen") as calls:
        varlen_attention(x, x, x, layout_q=layout, layout_k=layout, causal=True)
    assert "enable_gqa" not in calls[0]
