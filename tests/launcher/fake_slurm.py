"""srun and scontrol as small programs on PATH, for tests of what the supervisor asks and does.

    slurm = FakeSlurm(folder, run_dir, nodes={"n1": "IDLE", "n2": "IDLE"})
    slurm.set(plays=[{"outcome": "failed", "reason": "rank 1: no", "last_step": 5}, {"outcome": "finished"}])

Each srun takes the next play and writes it into RUN/status.json as ranks would;
one with `wait` does so when it is signalled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

SRUN = """\
#!{python}
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
folder = Path({folder!r})
state = json.loads((folder / "slurm.json").read_text())
with (folder / "calls").open("a") as stream:
    stream.write(json.dumps(["srun", *sys.argv[1:]]) + "\\n")
play = state["plays"].pop(0)
state |= play.pop("then", {{}})
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
(folder / "slurm.json").write_text(json.dumps(state))
(folder / "started").touch()
while play.pop("wait", False) or not asked and play.get("waits"):
    play["waits"] = True
    time.sleep(0.02)
play.pop("waits", None)
from megablip.engine.status import RunStatus
status = RunStatus.of_rank(Path({run_dir!r}))
code = play.pop("code", 0)
if "outcome" in play:
    status.end(play.pop("outcome"), **play)
elif play:
    status.update(**play)
sys.exit(code)
"""

SCONTROL = """\
#!{python} -IS
import json, sys
from pathlib import Path
folder = Path({folder!r})
state = json.loads((folder / "slurm.json").read_text())
verb, *words = sys.argv[1:]
if state["away"]:
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
if verb == "show" and words[0] == "job":
    job = state["jobs"].get(words[1])
    if job is None:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    nodes = f"Restarts={{state['restarts']}} ExcNodeList=n[8-9] NodeList={{state['nodelist']}}"
    print(f"JobId={{words[1]}} JobName=a=b JobState={{job}} {{nodes}} Command=/x y")
elif verb == "show" and words[0] == "node":
    print(f"NodeName={{words[1]}} NodeAddr=10.0.0.1 State={{state['nodes'][words[1]]}} Reason=")
else:
    with (folder / "calls").open("a") as stream:
        stream.write(json.dumps(["scontrol", verb, *words]) + "\\n")
    if verb in state["refuse"]:
        sys.exit("it is not allowed")
"""


class FakeSlurm:
    """Its two programs are in `folder`/bin; job 7 is the one under test."""

    def __init__(self, folder: Path, run_dir: Path, nodes: dict[str, str], nodelist: str = "n[1-2]"):
        self.bin, self._folder = folder / "bin", folder
        self.bin.mkdir(parents=True)
        state = {
            "plays": [], "nodes": nodes, "nodelist": nodelist, "jobs": {"7": "RUNNING"}, "restarts": 0, "refuse": [],
            "away": False,
        }  # fmt: skip
        (folder / "slurm.json").write_text(json.dumps(state))
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            values = {
                "python": sys.executable,
                "folder": str(folder),
                "run_dir": str(run_dir),
                "repository": str(REPOSITORY),
            }
            (self.bin / name).write_text(text.format(**values))
            (self.bin / name).chmod(0o755)

    def set(self, **changes: Any) -> None:
        path = self._folder / "slurm.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of each call, but those that only ask."""
        try:
            lines = (self._folder / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [call[1:] for call in map(json.loads, lines) if call[0] == program]

    @property
    def started(self) -> Path:
        """Is there once srun has begun to wait."""
        return self._folder / "started"
