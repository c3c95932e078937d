"""The pages say what is true: their commands run, their tables are the code's, their links lead
somewhere.

In a page, every fenced block is used unless the line before it is `<!-- not run: WHY -->`:

    ```console   `$ command` lines are run in order in one working folder for the page; the lines
                 after a command must be in what it prints, in that order; `...` matches anything
    ```python    is executed there
    ```bash      every `nibble train` in it is read, with its recipe, up to where it would start
    ```yaml, ```json, ```toml, ```jsonl, ```jinja after `<!-- file: NAME -->` are written to a file
    ```jsonl after `<!-- rows: FORMAT -->` must be read as that format, whole
    ```text after `<!-- trained -->` is the page's last rows with «what is trained» marked
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_files
import torch
import typer

from nibble.cli import main
from nibble.cli.app import app
from nibble.data import prepare, show_row
from nibble.errors import NibbleError
from nibble.launch.meeting import read_nodes
from nibble.numerics.formats import pack, unpack
from nibble.spec import recipes
from nibble.spec.aliases import ALIASES
from nibble.spec.config import Data, Quant, Source
from nibble.spec.formats import format_spec
from nibble.spec.fsdp_qlora import translate
from nibble.spec.load import load_recipe, parse_overrides

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "dev" / "LOG.md"]
FENCE = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S
)
FILES = ("yaml", "json", "jsonl", "jinja", "toml")
LAUNCHERS = ("torchrun", "accelerate")
SHELL = ("ls", "cat", "head", "tail", "wc")
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: the language with what follows it, the comment before it, the text."""

    info: str
    note: str
    body: str

    @property
    def language(self) -> str:
        return self.info.split(" ")[0]

    @property
    def skipped(self) -> bool:
        return self.note.startswith("not run: ")


def blocks(page: Path) -> list[Block]:
    return [
        Block(info=found["info"], note=found["note"] or "", body=found["body"])
        for found in FENCE.finditer(page.read_text())
    ]


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_files.write_model(folder / "my-model")
    tiny_files.write_data(folder)
    return folder


@pytest.fixture
def workplace(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(files, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    return folder


# Running -----------------------------------------------------------------------------------------


def commands(body: str) -> Iterator[tuple[str, list[str]]]:
    """Each `$ command`, with lines that end in a backslash joined, and the lines shown after it."""
    command, shown = "", []
    for line in body.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        else:
            shown.append(line)
    if command:
        yield command, shown


def run_command(command: str) -> str:
    """What a command prints; the exit code must be 0, or what follows `# exit ` in the command."""
    words, _, comment = command.partition("  # ")
    expected = int(comment.removeprefix("exit ")) if comment.startswith("exit ") else 0
    name, *arguments = shlex.split(words)
    if name == "nibble":
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(arguments)
        assert code == expected, f"{command}: exit {code}\n{out.getvalue()}"
        return out.getvalue()
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(targets), command
        return ""
    if name == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), command
        return ""
    if name == "python" and arguments[0] == "train.py":
        if "--help" in arguments:
            return subprocess.run(
                [sys.executable, str(ROOT / "train.py"), "--help"],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
        load_recipe(None, base=translate(arguments[1:]))  # the model and data are on a hub
        return ""
    if name in LAUNCHERS:  # tests/cli/test_launching.py runs them
        check_train_words(command)
        return ""
    assert name in SHELL, f"{command}: the tests run nibble, make, pip, train.py, {SHELL}"
    done = subprocess.run(words, shell=True, capture_output=True, text=True)
    assert done.returncode == expected, f"{command}: {done.stderr}"
    return done.stdout


def check_train_words(line: str) -> None:
    """Read a command line up to where the run would start; a variable stands for 0."""
    words = shlex.split(re.sub(r"\$\w+", "0", line), comments=True)
    command = typer.main.get_command(app).commands["train"]
    context = command.make_context("nibble train", words[words.index("train") + 1 :])
    load_recipe(context.params["recipe"], context.args)
    given = {key: context.params[key] for key in ("nodes", "node_rank", "master", "rendezvous")}
    read_nodes(**given)


def check_output(command: str, shown: list[str], printed: str) -> None:
    position = 0
    for line in shown:
        parts = [re.escape(part) for part in re.sub(r"\s+", " ", line.strip()).split("...")]
        pattern = ".*?".join(parts).replace(r"\ ", r"\s+")
        if not pattern.strip(".*?"):
            continue
        found = re.compile(pattern).search(printed, position)
        assert found, f"{command}: {line!r} is not in\n{printed}"
        position = found.end()


def read_rows(block: Block, page: str) -> list[str]:
    """Check that rows are read as the format of the block's note; returns them as marked text."""
    form = block.note.removeprefix("rows: ").split(",")[0]
    suffix = block.note.partition(", in ")[2] or "jsonl"
    path = Path(f"rows-of-{page.replace('/', '-')}.{suffix}")
    path.write_text(block.body)
    task = "classification" if form == "classification" else "causal-lm"
    splits = prepare(
        Data(train=(Source(path=str(path)),)), tiny_files.tokenizer(),
        task=task, seed=0, can_pack=False,
    )  # fmt: skip
    report = splits.report
    assert any(f"format {form} (found)" in note for note in report.notes), report.notes
    assert report.num_rows == report.num_read > 0, report.lines()
    marked = []
    for i in range(len(splits.train)):
        text = ""
        for part, trained in show_row(splits.train, i, tokenizer=tiny_files.tokenizer()):
            text += f"«{part}»" if trained else part
        marked.append(text.replace("»«", ""))
    return marked


@pytest.mark.parametrize("name", NAMES)
def test_what_a_page_shows_works(name: str, workplace: Path) -> None:
    namespace: dict[str, Any] = {}
    marked: list[str] = []
    for block in blocks(ROOT / name):
        if block.skipped:
            continue
        if block.note.startswith("file: "):
            assert block.language in FILES
            Path(block.note.removeprefix("file: ")).write_text(block.body)
        elif block.note.startswith("rows: "):
            marked = read_rows(block, name)
        elif block.note == "trained":
            assert "\n".join(marked).strip() == block.body.strip()
        elif block.language == "console":
            for command, shown in commands(block.body):
                check_output(command, shown, run_command(command))
        elif block.language == "python" and block.info == "python":
            exec(compile(block.body, name, "exec"), namespace)
        elif block.language == "bash":
            lines = [line for line in block.body.splitlines() if "nibble train" in line]
            assert lines, f"{name}: a script without nibble"
            for line in lines:
                check_train_words(line)
        elif block.language == "yaml":
            load_recipe(None, base=__import__("yaml").safe_load(block.body))
        else:
            assert block.info == "text" or block.info.startswith("python nibble/"), (
                f"{name}: a block of {block.info!r} is neither run nor marked"
            )


def test_the_guide_is_run() -> None:
    """The test above covers what it is there for."""
    ran = [
        command
        for name in NAMES
        for block in blocks(ROOT / name)
        if block.language == "console" and not block.skipped
        for command, _ in commands(block.body)
    ]
    used = {shlex.split(command)[1] for command in ran if command.startswith("nibble ")}
    assert {"train", "plan", "chat", "eval", "export", "recipes", "doctor"} <= used
    assert {"make demo", "make test"} <= set(ran)
    skipped = [block for name in NAMES for block in blocks(ROOT / name) if block.skipped]
    assert len(skipped) <= 3, "most of what is shown is run"


def test_the_checks_find_what_is_wrong(workplace: Path) -> None:
    with pytest.raises(AssertionError, match="is not in"):
        check_output("x", ["two ...", "one"], "one 1\ntwo 2\n")
    check_output("x", ["one", "...", "two ..."], "one 1\nthen\ntwo 2\n")
    for wrong in ("nibble train nothing.yaml", "make coffee", "pip install 'nibble[tea]'", "rm x"):
        with pytest.raises(AssertionError):
            run_command(wrong)
    row = '{"prompt": "a", "completion": " b"}\n'
    with pytest.raises(AssertionError):
        read_rows(Block(info="jsonl", note="rows: alpaca", body=row), "p")
    assert read_rows(Block(info="jsonl", note="rows: prompt-completion", body=row), "p") == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n« b<|im_end|>»\n"
    ]
    wrong_contract = signatures(ast.parse("class A:\n    def f(self, x: int) -> str: ..."))
    assert wrong_contract == {"A": "class", "A.f": "(self, x: int) -> str"}


# Tables and names --------------------------------------------------------------------------------


def test_generated_parts_are_what_the_code_says() -> None:
    pages = load_module(ROOT / "dev" / "pages.py")
    assert pages.stale(write=False) == [], "run: python dev/pages.py"
    named = {
        n for page in PAGES for n in re.findall(r"<!-- generated: (\S+) -->", page.read_text())
    }
    assert named == set(pages.GENERATORS)


def test_every_setting_and_every_alias_is_on_a_page() -> None:
    reference = (DOCS / "recipe.md").read_text()
    assert [row.path for row in recipes.fields() if f"`{row.path}`" not in reference] == []
    crosswalk = (DOCS / "coming-from.md").read_text()
    assert [word for word in ALIASES if f"`{word}`" not in crosswalk] == []


def test_every_error_is_on_its_page() -> None:
    tree = (DOCS / "errors.md").read_text()
    assert [e.__name__ for e in NibbleError.__subclasses__() if e.__name__ not in tree] == []


def test_pages_name_only_commands_that_exist() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    for page in TEXTS:
        found = re.findall(r"(?:`|\$ )nibble ([a-z][\w-]*)", page.read_text())
        assert set(found) <= known, page.name


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert name in ("version",) or f"nibble {name}" in readme, name


def table(page: Path, first: str) -> list[list[str]]:
    """The rows of the table whose header begins with `first`."""
    lines = iter(page.read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_bits_and_errors_of_formats_are_those_measured() -> None:
    rows = table(DOCS / "formats.md", "format")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator)
    names = set()
    for cells in rows:
        words = parse_overrides(cells[0].strip("`").split(" "))[0]
        quant = {key.removeprefix("quant."): value for key, value in words.items()}
        spec = format_spec(Quant.model_validate(quant))
        assert spec is not None
        names.add(spec.name)
        bits = spec.nbytes((4096, 4096)) * 8 / 4096**2
        assert float(cells[1]) == pytest.approx(bits, abs=0.005), cells
        dense = unpack(spec, pack(spec, weight), shape=(256, 512), dtype=torch.float32)
        error = (dense - weight).square().mean().sqrt() / weight.square().mean().sqrt()
        assert float(cells[2]) == pytest.approx(error.item(), rel=0.02), cells
    assert names == {"nf4", "fp4", "int8", "hqq", "ternary"}


# Links -------------------------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    text = FENCE.sub("", page.read_text())
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img [^>]*src=\"([^\"]+)\"", text)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    rest = [ROOT / "README.md"]
    while rest:
        page = rest.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        found = [link.partition("#")[0] for link in links(page) if "://" not in link]
        rest += [(page.parent / path).resolve() for path in found if path]
    assert {page.resolve() for page in TEXTS} <= seen


# Contracts ---------------------------------------------------------------------------------------


def signatures(tree: ast.AST) -> dict[str, str]:
    """`name` or `Class.name` -> arguments and result, and a class's annotated fields."""
    found: dict[str, str] = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            result = ast.unparse(node.returns) if node.returns else "None"
            found[node.name] = f"({ast.unparse(node.args)}) -> {result}"
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = ast.unparse(node.annotation)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = "class"
            found |= {f"{node.name}.{key}": text for key, text in signatures(node).items()}
    return found


def test_the_contracts_are_those_of_the_source() -> None:
    told = [b for b in blocks(DOCS / "architecture.md") if b.info.startswith("python nibble/")]
    assert len(told) >= 12
    for block in told:
        path = ROOT / "src" / block.info.removeprefix("python ")
        there = signatures(ast.parse(path.read_text()))
        for name, text in signatures(ast.parse(block.body)).items():
            assert there.get(name) == text, f"{path.name}: {name}{text}, but {there.get(name)}"


def test_the_floors_are_those_of_the_house() -> None:
    text = (ROOT / "tests" / "test_house.py").read_text()
    names = re.findall(r"frozenset\(\{([^}]*)\}\)", text)
    house = {name for group in names for name in re.findall(r'"(\w+)"', group)}
    rows = " ".join(row[1] for row in table(DOCS / "architecture.md", "floor"))
    assert house == {name.removesuffix(".py") for name in re.findall(r"`([\w.]+)/?`", rows)}


def test_json_in_pages_is_json() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "jsonl":
                assert all(json.loads(line) for line in block.body.splitlines())
