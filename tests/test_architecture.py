"""The house: layers import downward only, and the public names are what can be imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_compress

PACKAGE = Path(lightning_compress.__file__).parent
LAYER = {
    "callbacks": 3,
    "export": 2,
    "report": 2,
    "storage": 2,
    "quantization": 1,
    "pruning": 1,
    "distillation": 1,
    "clustering": 1,
    "decomposition": 1,
    "graph": 0,
    "schedules": 0,
    "selection": 0,
    "copying": 0,
    "compiled": -1,
    "errors": -1,
    "unfinished": -1,
    "processes": 0,
    "settings": 0,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stay_in_their_room_or_go_down(path: Path) -> None:
    own = [name.split(".")[1] for name in imported_modules(path) if name.startswith("lightning_compress.")]
    upward = [name for name in own if name != room(path) and LAYER[name] >= LAYER[room(path)]]
    assert upward == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_callbacks_know_lightning(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert room(path) == "callbacks" or not roots & {"lightning", "pytorch_lightning"}


def test_every_file_has_a_home_in_the_code_map() -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    missing = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if path.name != "__init__.py" and f"`{path.name}`" not in readme
    ]
    assert missing == []


def test_the_public_names_are_those_that_can_be_imported() -> None:
    assert len(set(lightning_compress.__all__)) == len(lightning_compress.__all__)  # ruff keeps them in order
    public = {
        name
        for name, value in vars(lightning_compress).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("lightning_compress.")
    }
    assert public == set(lightning_compress.__all__)
