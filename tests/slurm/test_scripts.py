"""Scripts of all shipped profiles, as they are rendered, on a Slurm that takes and runs them."""

from __future__ import annotations

from launcher.profile import load_profile
from launcher.render import render_job
from tests.launcher.test_render import HOSTILE, SHIPPED


def test_scripts_are_taken_and_their_words_arrive(cluster, tmp_path):
    interpreter = tmp_path / "an interpreter"
    interpreter.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    interpreter.chmod(0o755)
    folder = tmp_path / "$(touch PWNED) `touch PWNED`\n'\""
    folder.mkdir()
    jobs = {}
    for name in SHIPPED:
        profile = load_profile(name).model_copy(update={"python": str(interpreter)})
        script = folder / f"{name}.sbatch"
        script.write_text(render_job(profile, name=f"{name} $(touch PWNED)", nodes=2, command=HOSTILE, folder=folder))
        output = tmp_path / f"{name}.out"
        jobs[name] = cluster.submit(f"--output={output}", str(script)), output
    for name, (job, output) in jobs.items():
        assert job.wait() == "COMPLETED", job.describe()
        assert output.read_text().split("\0")[:-1] == ["-m", "launcher", *HOSTILE]
        shown = job.show()
        asked = {"JobName": f"{name}_touch_PWNED_", "NumNodes": "2", "TimeLimit": "1-00:00:00", "Requeue": "1"}
        assert asked.items() <= shown.items()
        assert shown["TresPerNode"] == "gres:gpu:8"
    assert not [path for path in tmp_path.rglob("*") if path.name == "PWNED"]
