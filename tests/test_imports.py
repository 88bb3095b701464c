"""How the rooms of the house hang together: imports point one way, private parts stay private."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"

# Bottom to top. A module imports from its own room or from lower layers, never from its own layer's
# other rooms or from above. What is named as text ("module:function") and loaded when it is asked
# for, as stages are, is no import.
LAYERS = [
    {"errors"},
    {"untrusted", "signals", "hardware"},
    {"console", "config"},
    {"files", "flags", "stages", "objectives", "evaluation"},
    {"process", "data"},
    {"models"},
    {"reports"},
    {"training"},
    {"ppo"},
    {"inference"},
    {"sft", "reward_model", "ppo_trainer", "dpo", "score"},
    {"pipeline"},
    {"rlhf"},  # the package itself, which names the API and loads it when it is asked for
    {"quickstart", "vertex"},
    {"cli"},
    {"__main__"},
]
# Names that several modules may define: the door of a program.
SHARED_NAMES = {"main"}
# Not private, whatever it is called.
PUBLIC = {("os", "_exit")}
# Modules that libraries neither document nor keep stable.
INTERNAL = (
    "google_cloud_pipeline_components._",
    "peft.tuners.tuners_utils",
    "peft.utils.other",
    "torch._",
    "transformers.integrations",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.models",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    return {
        module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(SRC.rglob("*.py"))
    }


def imported_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """All that a module imports, wherever it does so, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)


@cache
def arrows() -> dict[str, dict[str, int]]:
    """Which module imports which, with the line; a name that is no module counts as its module."""
    found: dict[str, dict[str, int]] = {name: {} for name in modules()}
    for importer, tree in modules().items():
        for name, line in imported_names(tree):
            if name.split(".")[0] == "rlhf":
                module = name if name in modules() else name.rpartition(".")[0]
                assert module in modules(), f"{importer}:{line}: there is no {name}"
                if module != importer:
                    found[importer].setdefault(module, line)
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_no_modules_import_each_other() -> None:
    graph = {importer: set(imported) for importer, imported in arrows().items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_imports_point_downward() -> None:
    layer = {name: number for number, rooms in enumerate(LAYERS) for name in rooms}
    assert {room(module) for module in modules()} == set(layer), "LAYERS names every room"
    upward = [
        f"{importer}:{line} imports {imported}"
        for importer, found in arrows().items()
        for imported, line in found.items()
        if room(importer) != room(imported) and layer[room(importer)] <= layer[room(imported)]
    ]
    assert not upward


def test_the_doors_open_without_torch() -> None:
    """`rlhf --help`, a wrong flag and a check of types must not take seconds."""
    code = "import sys, rlhf, rlhf.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def reaches_in(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Where a module uses private parts of anything but its own classes, or internal modules."""
    for name, line in imported_names(tree):
        if any(private(part) for part in name.split(".")) or f"{name}.".startswith(INTERNAL):
            yield name, line
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()") and (owner, node.attr) not in PUBLIC:
                yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.keyword) and private(node.arg or ""):
            yield f"{node.arg}=", node.value.lineno


def test_private_parts_of_others_are_reached_in_compat_only() -> None:
    found = [
        f"{module}:{line}: {what}"
        for module, tree in modules().items()
        if not module.endswith(".compat")
        for what, line in reaches_in(tree)
    ]
    assert not found


def test_reaching_in_is_seen() -> None:
    code = """
import torch._dynamo
from transformers.models.t5.modeling_t5 import T5LayerNorm
model.config._attn_implementation
self._filesystem._location
load(_fast_init=True)
"""
    assert len(list(reaches_in(ast.parse(code)))) == 5
    code = "import os\nself._x = cls._y = os._exit\nsuper()._z(__name__, model.config.x)"
    assert not list(reaches_in(ast.parse(code)))


def test_a_public_name_is_defined_once() -> None:
    """A name that means two things makes every reader look twice."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                homes[node.name].append(module)
    twice = {
        name: found
        for name, found in homes.items()
        if len(found) > 1 and not name.startswith("_") and name not in SHARED_NAMES
    }
    assert not twice


def test_no_test_imports_a_test() -> None:
    """What two of them need is in tests/support."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name, line in imported_names(ast.parse(path.read_text(encoding="utf-8")))
        if any(part.startswith("test_") for part in name.split("."))
    ]
    assert not found
