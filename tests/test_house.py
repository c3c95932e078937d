"""The rules of the house that review should not have to check."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "nibble"

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"spec"}),
    frozenset({"numerics"}),
    frozenset({"kernels"}),
    frozenset({"nn", "optim"}),
    frozenset({"models", "weights", "data"}),
    frozenset({"place", "launch"}),
    frozenset({"use"}),
    frozenset({"train"}),
    frozenset({"run"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
HEAVY = {"torch", "numpy", "transformers", "safetensors", "datasets", "triton"}
PURE = {"os", "pathlib", "logging", "time", "datetime", "random", "torch.distributed", "torch.nn"}
BANNED: dict[str, set[str]] = {
    "errors": HEAVY,
    "spec": HEAVY,
    "numerics": PURE | {"transformers", "safetensors"},
    "kernels": {"torch.distributed", "logging", "time"},
    "nn": {"torch.distributed", "safetensors", "datasets"},
    "optim": {"torch.distributed", "safetensors", "transformers", "datasets"},
    "models": {"torch.distributed"},
    "weights": {"torch.distributed"},
    "data": {"torch.distributed"},
}
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 75


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def folder(path: Path) -> str:
    """The name that carries a floor: the first folder, or the module itself at the top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported module as a dotted name, wherever in the file the import stands."""
    package = ("nibble", *path.relative_to(PACKAGE).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def breaches(path: Path) -> list[str]:
    here = folder(path)
    found = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "nibble" and len(parts) > 1 and parts[1] in FLOOR:
            target = parts[1]
            if target != here and FLOOR[target] >= FLOOR[here]:
                found.append(f"{path.name}:{line}: {here} must not import {target}")
        for banned in BANNED.get(here, ()):
            if name == banned or name.startswith(banned + "."):
                found.append(f"{path.name}:{line}: {here} must not import {name}")
    return found


def test_every_module_stands_on_a_floor() -> None:
    top = {folder(path) for path in modules()} - {"__init__"}
    assert top == {
        name for name in FLOOR if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()
    }
    assert {"spec", "numerics", "kernels", "nn", "optim", "models", "weights", "data"} <= top


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if folder(path) != "__init__":
        assert breaches(path) == []


def test_the_import_check_finds_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spec").mkdir()
    bad = tmp_path / "spec" / "bad.py"
    bad.write_text(
        "def f():\n    import torch.nn\n"
        "    from ..train.loop import loop\n    from nibble.nn import quant\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert len(breaches(bad)) == 3


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_MODULE_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module begins with its idea"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_validating_a_recipe_wakes_nothing_heavy() -> None:
    code = (
        "import sys, json; from nibble.spec import config; "
        "config.Recipe(model={'path': 'x'}); "
        "print(json.dumps(sorted(set(sys.modules) & {'torch', 'transformers', 'numpy'})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []


def test_text_names_no_machine() -> None:
    """Docs and code speak of nibble alone: no home folder, no absolute path of a workplace."""
    files = [
        *modules(),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "dev").rglob("*.md"),
    ]
    needles = ["/" + "work/", "/" + "root/", "/" + "home/"]
    found = [f"{f.name}: {n}" for f in files for n in needles if n in f.read_text()]
    assert found == []
