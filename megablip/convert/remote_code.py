"""The model's own code beside its weights, to load them where megablip is not installed.

transformers loads Python files of a model's folder (`trust_remote_code=True`):
the module that config.json's `auto_map` names, and what it imports relatively,
as files side by side. So the modules that the model needs become such files:

    megablip/model/blip3.py          -> megablip_model_blip3.py
    from megablip.errors import X    -> from .megablip_errors import X

Three more things change. Imports for type checkers go, and what registers the
classes with transformers, for they are named in `auto_map`. An import of a
package inside a function, which only some machines need, gets a `try` around it:
transformers demands every package that is imported outside of one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from megablip.errors import CheckpointError

MODEL, PROCESSOR = "megablip.model.blip3", "megablip.model.processor"


def flat_name(module: str) -> str:
    """`megablip.model.blip3` -> `megablip_model_blip3`."""
    return module.replace(".", "_")


AUTO_MAPS = {
    "config.json": {
        "AutoConfig": f"{flat_name(MODEL)}.Blip3Config",
        "AutoModel": f"{flat_name(MODEL)}.Blip3ForConditionalGeneration",
        "AutoModelForImageTextToText": f"{flat_name(MODEL)}.Blip3ForConditionalGeneration",
        "AutoProcessor": f"{flat_name(PROCESSOR)}.Blip3Processor",
    },
    "processor_config.json": {"AutoProcessor": f"{flat_name(PROCESSOR)}.Blip3Processor"},
}
"""Which class transformers takes from where, by the file that says so."""

REQUIRED = {"jinja2", "numpy", "packaging", "PIL", "tokenizers", "torch", "transformers"}


def write_remote_code(folder: Path) -> None:
    """Write the modules that model and processor need into a folder."""
    waiting, done = [MODEL, PROCESSOR], set()
    while waiting:
        module = waiting.pop()
        if module not in done:
            done.add(module)
            text, imported = standalone(_path_of(module).read_text(encoding="utf-8"))
            (folder / f"{flat_name(module)}.py").write_text(text, encoding="utf-8")
            waiting += imported


def standalone(source: str) -> tuple[str, list[str]]:
    """A module's source with relative imports, and the modules of megablip that it imports.

    Raises:
        CheckpointError: it imports one in a way that transformers would not follow.
    """
    tree, lines, imported = ast.parse(source), source.splitlines(), []
    removed: list[ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            removed += node.body
    for node in _statements(tree, removed):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "megablip":
            imported += _relative(node, lines)
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "megablip" for alias in node.names):
            raise CheckpointError(f"line {node.lineno} imports megablip by `import`, not `from`", where="remote code")
        elif isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset and not _is_required(node):
            indent = " " * node.col_offset
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = "    " + lines[number]
            lines[node.lineno - 1] = f"{indent}try:\n{lines[node.lineno - 1]}"
            lines[node.end_lineno - 1] += f"\n{indent}finally:\n{indent}    pass"
    removed += [node for node in tree.body if _registers(node)]
    for node in removed:
        lines[node.lineno - 1] = " " * node.col_offset + "pass"
        lines[node.lineno : node.end_lineno] = [None] * (node.end_lineno - node.lineno)
    return "\n".join(line for line in lines if line is not None) + "\n", imported


def _statements(tree: ast.AST, removed: list[ast.stmt]) -> Iterator[ast.AST]:
    """All nodes but those inside what is removed, and inside a `try`, which transformers passes over."""
    for node in ast.iter_child_nodes(tree):
        if node not in removed and not isinstance(node, ast.Try):
            yield node
            yield from _statements(node, removed)


def _relative(node: ast.ImportFrom, lines: list[str]) -> list[str]:
    """Rewrite an import from megablip in `lines`; returns the modules it needs."""
    line, module = node.lineno - 1, node.module
    inner = [f"{module}.{alias.name}" for alias in node.names]
    if not any(_path_of(name) for name in inner):
        lines[line] = re.sub(rf"from {re.escape(module)} import", f"from .{flat_name(module)} import", lines[line])
        return [module]
    # `from megablip.model.attention import kernels`: a module, not a name in one.
    if len(inner) > 1:
        raise CheckpointError(f"line {node.lineno} imports a module among other names", where="remote code")
    known = node.names[0].asname or node.names[0].name
    lines[line] = f"{' ' * node.col_offset}from . import {flat_name(inner[0])} as {known}"
    return inner


def _path_of(module: str) -> Path | None:
    base = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _is_required(node: ast.Import | ast.ImportFrom) -> bool:
    names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return all(name.split(".")[0] in REQUIRED | sys.stdlib_module_names for name in names)


def _registers(node: ast.stmt) -> bool:
    """`AutoModel.register(...)`."""
    function = getattr(getattr(node, "value", None), "func", None)
    owner = getattr(getattr(function, "value", None), "id", "")
    return getattr(function, "attr", "") == "register" and owner.startswith("Auto")
