"""Cluster profiles: those that are shipped load, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.profile import PROFILES, ClusterProfile, dump_profile, load_profile
from megablip.errors import ConfigError

SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "ours.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_and_survives_writing(name, tmp_path):
    profile = load_profile(name)
    assert load_profile(written(tmp_path, dump_profile(profile))) == profile


def test_these_are_shipped():
    assert SHIPPED == ["container", "h100_infiniband", "plain"]


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load_profile("h200")
    assert "plain" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time: '1:00:00'\nparition: gpu", "did you mean 'partition'"),
        ("time: '1:00:00'\ncontainer: {runtime: pyxis, image: a, mount: []}", "did you mean 'mounts'"),
        ("time: 24:00:00", "write it in quotes"),
        ("time: 60", "write it in quotes"),
        ("time: soon", "none that Slurm knows"),
        ("time: '5:00'", "leaves nothing to train in"),
        ("time: '1:00:00'\npartition: 'gpu --wrap x'", "partition"),
        ("time: '1:00:00'\npartition: \"gpu\\n#SBATCH --wrap\"", "partition"),
        ("time: '1:00:00'\noptions: ['--wrap=touch x']", "options.0"),
        ("time: '1:00:00'\nmodules: ['a; touch x']", "modules.0"),
        ("time: '1:00:00'\nenvironment: {'A B': c}", "environment"),
        ("time: '1:00:00'\nenvironment: {A: 1}", "environment.A"),
        ("time: '1:00:00'\ngpus_per_node: 0", "how many ranks a node has"),
        ("time: '1:00:00'\ngpus_per_node: 2\nranks_per_node: 3", "need as many GPUs"),
        ("time: '1:00:00'\nsignal_lead_s: 70000", "signal_lead_s"),
        ("[]", "not a mapping"),
        ("{", "can't be read"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_profile(written(tmp_path, text))
    assert "ours.yaml" in caught.value.where


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("2:00:01", 7201), ("1-2", 93600), ("1-2:3", 93780), ("1-2:3:4", 93784)],
)
def test_a_time_is_read_as_slurm_does(time, seconds):
    assert ClusterProfile(time=time).time_s == seconds


def test_a_step_runs_in_the_container(tmp_path):
    plain = ClusterProfile(time="1:00:00", python="/bin/py thon")
    assert plain.step_command(["-m", "x y"], tmp_path) == ["/bin/py thon", "-m", "x y"]
    inside = {"image": "an image", "mounts": ["/a", "/b:/c"], "python": "py"}
    pyxis = ClusterProfile(time="1:00:00", container={"runtime": "pyxis", **inside})
    assert pyxis.step_command(["x y"], tmp_path) == [
        "--container-image=an image", "--container-mounts=/a,/b:/c", f"--container-workdir={tmp_path}", "py", "x y"
    ]  # fmt: skip
    apptainer = ClusterProfile(time="1:00:00", container={"runtime": "apptainer", **inside})
    assert apptainer.step_command(["x y"], tmp_path) == [
        "apptainer", "exec", "--nv", "--bind", "/a", "--bind", "/b:/c", "--pwd", str(tmp_path), "an image", "py", "x y"
    ]  # fmt: skip
