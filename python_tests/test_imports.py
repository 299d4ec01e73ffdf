"""Which module imports which: a room only those under it, and nobody in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import grpo_kernels

PACKAGE = Path(grpo_kernels.__file__).parent
#: From the bottom up. Modules of one room may import each other, in no circle.
ROOMS = (
    ("version", "files", "errors", "hub"),
    ("dtypes", "calls", "computed_once", "validation", "named_arguments", "device_values", "triton_probe"),
    ("measured_backends", "backends"),
    ("loss",),
    ("ops.registration", "ops.gradients"),
    ("ops.tokens",),
    ("ops.rows",),
    ("ops.head",),
    ("objectives", "preferences", "modules", "reward_shaping", "adaptive_entropy", "info"),
    ("integrations.presets", "presets"),
    ("integrations",),
    ("",),  # the package's own names
    ("rewards",),
    ("training",),
    ("cli",),
)
#: Files that a stranger may be sent to read, and nothing in them is longer than this.
CORE = ("loss", "ops", "integrations", *(module for room in ROOMS[:3] for module in room), *ROOMS[8])


def _modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = _modules()


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def _imports(module: str) -> Iterator[str]:
    """Everything imported anywhere in a module: at its top, in a function, under TYPE_CHECKING, by name at a call."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "grpo_kernels":
            base = ".".join((node.module or "").split(".")[1:])
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                assert name in MODULES or base in MODULES, f"{module} imports from {node.module}, which is not there"
                yield name if name in MODULES else base
        elif isinstance(node, ast.Import):
            yield from (name.name.partition(".")[2] for name in node.names if name.name.split(".")[0] == "grpo_kernels")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "lazy_import":
            assert isinstance(node.args[0], ast.Constant)
            yield str(node.args[0].value).partition(".")[2]


def _room(module: str) -> int:
    """The room with the longest name that a module is in."""
    found = [
        (len(name), number)
        for number, room in enumerate(ROOMS)
        for name in room
        if module == name or (name and module.startswith(f"{name}."))
    ]
    return max(found)[1] if found else -1


#: What reads a recipe: it is made there, and everything else takes named values.
READS_RECIPES = {
    "recipe",
    "task",
    "run",
    "loop",
    "stages",
    "stages.runner",
    "stages.work",
}


def test_every_module_has_a_room() -> None:
    packages = {"ops"}  # which hold rooms
    assert {module for module in MODULES if _room(module) < 0} == packages


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module: str) -> None:
    up = sorted({other for other in _imports(module) if _room(other) > _room(module)} - {module})
    assert not up, f"{module} imports from a room above it: {', '.join(up)}"


def test_no_circle_of_imports() -> None:
    """Also none that is held open by an import in a function."""
    graph = {module: sorted(set(_imports(module)) - {module}) for module in MODULES if module}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _core() -> list[str]:
    return [m for m in MODULES if any(m == name or m.startswith(f"{name}.") for name in CORE)]


@pytest.mark.parametrize("module", _core())
def test_autograd_functions_have_six_inputs_at_most(module: str) -> None:
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ClassDef) and any("Function" in ast.unparse(base) for base in node.bases):
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and function.name == "forward":
                    inputs = [x.arg for x in function.args.args if x.arg != "ctx"]
                    assert len(inputs) <= 6, f"{node.name}: {inputs}"


def _lines(function: ast.FunctionDef) -> int:
    """Of its body: a signature and a docstring do not count."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("module", _core())
def test_files_and_functions_are_short(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) < 400
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.FunctionDef) and not _is_kernel(node):
            assert _lines(node) < 60, f"{node.name}: {_lines(node)} lines"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("training.")])
def test_a_recipe_is_seen_at_the_edge_alone(module: str) -> None:
    if module.removeprefix("training.") in READS_RECIPES:
        return
    assert "training.recipe" not in set(_imports(module))
    for node in ast.walk(_tree(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = {x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            assert "recipe" not in names, f"{node.name}: {names}"


def test_of_the_loop_the_constructor_alone_takes_a_recipe() -> None:
    for node in ast.walk(_tree("training.loop")):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            assert "recipe" not in {x.arg for x in (*node.args.args, *node.args.kwonlyargs)}, node.name
