"""Imports run one way, and modules stay short: read from the source, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "megablip"

# From the first to the last; what stands in one group may import each other
# (a test below forbids circles), and everything from the groups before it.
ORDER = [
    {"records", "errors", "config"},
    {"pages"},
    {"tokens", "chat"},
    {"data"},
    {"model"},
    {"engine"},
    {"checkpoint"},
    {"convert"},
    {"metrics"},
    {"evaluate", "replay"},
    {"doctor", "launch", "train", "take_over", "cli"},
]
DATA_ORDER = [
    "tar",
    "index",
    "cache",
    "shards",
    "order",
    "members",
    "regions",
    "schemas",
    "images",
    "encode",
    "pack",
    "split",
    "lanes",
    "collate",
    "samples",
    "reference",
    "quarantine",
    "handover",
    "workers",
    "loader",
]
PROGRAMS = {"launcher", "tools", "tokenization", "tests"}
MAX_LINES, MAX_LINES_TRAIN = 600, 300

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`megablip.data.order` for megablip/data/order.py, `megablip.data` for its __init__.py."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {name_of(path) for path in MODULES}


class _WithoutTypeChecking(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
        return self.generic_visit(node)


def imports(path: Path) -> Iterator[str]:
    """Modules named by any import statement of a file, inside functions too, `if TYPE_CHECKING` left out."""
    tree = _WithoutTypeChecking().visit(ast.parse(path.read_text()))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            # `from megablip.data import order` imports a module, `from megablip.errors import X` doesn't.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in KNOWN else node.module


def group_of(module: str) -> int | None:
    """Place in ORDER of a module of megablip; None for megablip itself, which imports nothing."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    return next(number for number, names in enumerate(ORDER) if parts[1] in names)


def ids(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_a_module_imports_from_its_left_only(path):
    own = name_of(path)
    for imported in imports(path):
        assert imported.split(".")[0] not in PROGRAMS, f"{own} imports {imported}, a program"
        if not imported.startswith("megablip."):  # megablip itself has a version and imports nothing
            continue
        assert group_of(imported) <= (group_of(own) or 0), f"{own} imports {imported}"
        parts, other = own.split("."), imported.split(".")
        if parts[1] == other[1] == "data" and len(parts) == len(other) == 3:
            assert DATA_ORDER.index(other[2]) < DATA_ORDER.index(parts[2]), f"{own} imports {imported}"


def test_the_orders_name_what_there_is():
    top = {name.split(".")[1] for name in KNOWN if "." in name}
    assert top == set.union(*ORDER)
    assert {path.stem for path in (PACKAGE / "data").glob("*.py")} - {"__init__"} == set(DATA_ORDER)


def test_there_is_no_circle():
    edges = {name_of(path): {name for name in imports(path) if name in KNOWN} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for imported in edges[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_the_walk_sees_all_kinds_of_import(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import a.b\nfrom megablip.data import order\nfrom megablip.errors import ConfigError\n"
        "if TYPE_CHECKING:\n    import unseen\ndef f():\n    import inside\n"
    )
    assert sorted(imports(source)) == ["a.b", "inside", "megablip.data.order", "megablip.errors"]


def test_planning_and_decoding_need_no_torch():
    """Decode processes are many; each would pay torch's import and memory. Same for what answers mistakes."""
    script = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'deepspeed'])\n"
        "import megablip.data.order, megablip.data.workers, megablip.launch, megablip.cli"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_a_module_is_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= (MAX_LINES_TRAIN if path == PACKAGE / "train.py" else MAX_LINES)
