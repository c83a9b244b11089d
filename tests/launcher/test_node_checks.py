"""What one node tells of itself: played files of /sys, a played nvidia-smi."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from launcher import node_checks
from launcher.node_checks import code, fabric, folders, gpus, interfaces

H100 = "NVIDIA H100 80GB HBM3, 570.86.15, 4, 0"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Sets what nvidia-smi prints, one line for each GPU."""
    monkeypatch.setattr(node_checks, "has_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def play(*lines: str, code: int = 0) -> None:
        text = "\n".join(lines)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return play


def test_enough_gpus_are_right(smi):
    smi(*[H100] * 8)
    found = gpus(8)
    assert [(f.subject, f.found) for f in found] == [
        ("GPUs", "8 x NVIDIA H100 80GB HBM3, 8 for this job"), ("driver", "570.86.15")
    ]  # fmt: skip
    assert all(f.ok and not f.warns for f in found)


def test_a_gpu_that_is_missing_is_told(smi):
    smi(*[H100] * 7)
    assert not gpus(8)[0].ok
    assert gpus(7)[0].ok


def test_a_gpu_that_is_in_use_is_told(smi):
    smi(H100, "NVIDIA H100 80GB HBM3, 570.86.15, 40321, 0")
    [busy] = [f for f in gpus(2) if f.warns]
    assert (busy.subject, busy.ok) == ("GPU 1", True)
    assert "40321 MiB" in busy.found


def test_memory_errors_keep_a_node_out(smi):
    smi(H100, "NVIDIA H100 80GB HBM3, 570.86.15, 4, 3", "NVIDIA H100 80GB HBM3, 570.86.15, 4, [N/A]")
    [broken] = [f for f in gpus(3) if not f.ok]
    assert broken.subject == "GPU 1"


def test_other_jobs_gpus_are_not_looked_at(smi, monkeypatch):
    smi("A, 1, 60000, 9", H100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [f.found for f in gpus(1)] == ["1 x NVIDIA H100 80GB HBM3, 1 for this job", "570.86.15"]
    assert not gpus(2)[0].ok


def test_an_nvidia_smi_that_fails_is_told_with_its_words(smi):
    smi("Unable to determine the device handle for GPU 0000:9B:00.0: Unknown Error", code=255)
    [broken] = gpus(1)
    assert not broken.ok
    assert "Unknown Error" in broken.found


def test_no_nvidia_smi_is_told(smi, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert not gpus(1)[0].ok


def port(root: Path, name: str, state: str, rate: str = "400 Gb/sec (4X NDR)") -> None:
    folder = root / name / "ports" / "1"
    folder.mkdir(parents=True)
    for file, text in (("state", state), ("rate", rate), ("link_layer", "InfiniBand")):
        (folder / file).write_text(text + "\n")


def test_ports_are_counted_by_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "INFINIBAND", tmp_path)
    for number in range(8):
        port(tmp_path, f"mlx5_{number}", "4: ACTIVE" if number else "1: DOWN")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64 << 10, 64 << 10))
    ports, locked = fabric()
    assert ports.found == "7 x InfiniBand 400 Gb/sec (4X NDR), 1 x InfiniBand not active"
    assert locked.warns
    assert "--propagate=NONE" in locked.remedy
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    assert len(fabric()) == 1


@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", True),
        ("NCCL_SOCKET_IFNAME", "ib0,eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "eth0", True),
    ],
)
def test_an_interface_that_is_named_must_be_there(tmp_path, monkeypatch, variable, value, right):
    monkeypatch.setattr(node_checks, "INTERFACES", tmp_path)
    for name in ("lo", "eth0"):
        (tmp_path / name).mkdir()
    for name in node_checks.INTERFACE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert interfaces() == []
    monkeypatch.setenv(variable, value)
    found = interfaces()
    assert (found == []) == right
    assert all(not f.ok and "eth0, lo" in f.found for f in found)


def test_scratch_and_cache_are_made(tmp_path, monkeypatch):
    for name in node_checks.CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels" / "triton"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file" / "scratch"))
    scratch, cache = folders()
    assert (scratch.subject, scratch.ok) == ("TMPDIR", False)
    assert cache.ok
    assert (tmp_path / "kernels" / "triton").is_dir()


def test_the_code_is_known_by_its_source():
    assert code() == code()
    assert code().found.startswith("megablip ")
