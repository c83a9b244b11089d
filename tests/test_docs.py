"""What the documents name is there, and the commands they show are understood."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import braceexpand
import pytest
from typer.testing import CliRunner

from megablip.cli import app
from megablip.config import load_config

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
TOP = ["megablip", "ds_configs", "launcher", "tools", "tokenization", "tests", ".ci"]


def commands(document: str) -> list[str]:
    """Lines of ```sh blocks, indented `make` lines, and inline code that is a command of ours."""
    text = (REPOSITORY / document).read_text()
    found = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]
    found += re.findall(r"^    (make [\w-]+)", text, re.M)
    found += re.findall(r"`((?:make|megablip|torchrun|python -m) [^`]+)`", text)
    return [line for line in found if line.strip() and not line.startswith("#")]


COMMANDS = sorted({command for document in DOCUMENTS for command in commands(document)})


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M))


def assert_understood(words: list[str]) -> None:
    """The program knows the verb and every option, and a recipe that is named loads."""
    program, *rest = words
    options = [word for word in rest if word.startswith("-") and word != "-m"]
    if program == "make":
        assert {word for word in rest if "=" not in word} <= targets()
    elif program == "megablip":
        verbs = [word for word in rest[:2] if re.fullmatch(r"[a-z][a-z-]*", word)]
        result = CliRunner().invoke(app, [*verbs, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        for option in options:
            assert option in result.output
        for word in rest:
            if word.endswith(".yaml") and word.startswith("megablip/"):
                load_config(REPOSITORY / word)
    elif "-m" in rest:
        module = rest[rest.index("-m") + 1]
        assert importlib.util.find_spec(module), module
        if program == "python":
            done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=REPOSITORY, capture_output=True)
            assert done.returncode == 0, done.stderr
    else:
        assert program in ("tensorboard",)
        assert shutil.which(program, path=Path(sys.executable).parent)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command):
    assert_understood(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "make demmo",
        "megablip trian x.yaml",
        "megablip train --no-such-option x.yaml",
        "megablip convert zero-to-fh a b",
        "megablip train megablip/recipes/mini/no.yaml",
        "python -m tools.nothing",
        "conda install megablip",
    ],
)
def test_a_wrong_command_would_be_found(command):
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever it is, the test above would fail)
        assert_understood(shlex.split(command))


def test_the_main_commands_are_shown():
    for command in ("make demo", "make hello", "make test", "megablip doctor"):
        assert command in COMMANDS
    assert any(command.startswith("megablip train ") for command in COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_path_that_is_named_exists(document):
    text = (REPOSITORY / document).read_text()
    named = re.findall(r"\]\((?!https?://|#|mailto:)([^)\s]+)\)", text)
    named += re.findall(rf"(?<![\w./-])((?:{'|'.join(map(re.escape, TOP))})/[\w./{{}},-]*)", text)
    named += re.findall(r"`((?:Makefile|setup\.cfg|pyproject\.toml|[A-Z]+\.md))`", text)
    for name in named:
        for path in braceexpand.braceexpand(name.rstrip(".,")):
            assert (REPOSITORY / path).exists(), f"{document} names {path}"


def test_the_makefile_explains_its_targets():
    head = (REPOSITORY / "Makefile").read_text().partition("\n\n")[0]
    for target in targets() - {"clean", ".PHONY"}:
        assert f"make {target}" in head
