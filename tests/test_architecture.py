"""The design's walls: import direction, size caps, doors of third parties, no torch where none is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keeptune import config

PACKAGE = Path(__file__).resolve().parents[1] / "keeptune"
MODULES = sorted(PACKAGE.rglob("*.py"))
RANKS = [
    {"errors", "storage", "chain", "progress"},
    {"data"},
    {"text"},
    {"model"},
    {"training"},
    {"evaluation"},
    {"retention"},
    {"search"},
    {"report"},
    {"recipe_text", "config_data"},
    {"config", "terminal"},
    {"terminal_change"},
    {"stages"},
    {"terminal_check", "terminal_plan", "terminal_search"},
    {"invocation"},
    {"lab"},
    {"cli"},
]
DOORS = {
    "transformers": ("model/", "lab/pretrain.py"),
    "peft": ("model/",),
    "matplotlib": ("report/figures.py",),
    "huggingface_hub": ("model/folder.py", "model/load.py", "data/source.py"),
    "datasets": ("data/source.py",),
    "lm_eval": ("evaluation/harness.py",),
    "optuna": ("search/",),
    "typer": ("cli.py",),
    "yaml": ("recipe_text.py", "model/card.py", "stages/run.py"),
}
TORCH_FREE = (
    "data/",
    "text/",
    "report/",
    "search/",
    "evaluation/canaries.py",
    "evaluation/comparisons.py",
    "evaluation/intervals.py",
    "evaluation/metrics.py",
    "evaluation/scores.py",
    "recipe_text.py",
    "config.py",
    "config_data.py",
    "invocation.py",
    "cli.py",
)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(path: Path) -> str:
    return relative(path).split("/")[0].removesuffix(".py")


def rank(name: str) -> int:
    return next((i for i, rooms in enumerate(RANKS) if name in rooms), -1)


def imported(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            if node.module == "keeptune":
                yield from (f"keeptune.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_imports_only_its_own_room_or_one_to_its_left(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return
    mine = rank(room(path))
    assert mine >= 0, f"{relative(path)} stands in no known room"
    for name in imported(path):
        if name.startswith("keeptune."):
            other = name.split(".")[1]
            assert other.startswith("__") or rank(other) < mine or other == room(path) or mine == rank(other) == 0, name


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_each_third_party_has_one_door(path: Path) -> None:
    for name in imported(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or relative(path).startswith(doors), f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_torch_where_none_is_needed(path: Path) -> None:
    if relative(path).startswith(TORCH_FREE):
        assert not {"torch", "transformers", "peft"} & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_and_functions_stay_under_their_caps(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for function in functions(path):
        docstring = function.body[0] if ast.get_docstring(function) else None
        lines = (function.end_lineno or 0) - function.lineno + 1
        if docstring is not None:
            lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
        cap = 120 if (relative(path), function.name) == ("training/loop.py", "train") else 60
        assert lines <= cap, f"{relative(path)}: {function.name} has {lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_public_functions_and_modules_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), relative(path)
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        assert not public or ast.get_docstring(node), f"{relative(path)}: {node.name}"  # pyright: ignore


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_pickle_no_eval_no_print_and_no_environment_below_the_command_line(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not {"pickle", "joblib", "dill"} & {name.split(".")[0] for name in imported(path)}
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {ast.unparse(call) for call in calls}
    assert not names & {"torch.load", "torch.save", "eval", "exec", "pickle.load", "np.load"}
    assert "trust_remote_code=True" not in source
    if relative(path) != "cli.py":
        assert "print" not in names
    if relative(path) not in ("cli.py", "invocation.py"):
        assert not re.search(r"os\.environ|os\.getenv|sys\.argv", source), relative(path)


@pytest.mark.parametrize("path", [p for p in MODULES if relative(p) != "cli.py"], ids=relative)
def test_nothing_swallows_every_error(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            blind = ast.unparse(node.type) in {"Exception", "BaseException"}
            assert not blind or isinstance(node.body[-1], ast.Raise), f"{relative(path)}:{node.lineno}"


def test_the_command_line_starts_without_torch() -> None:
    unwanted = ("torch", "transformers", "peft", "matplotlib", "pyarrow", "optuna")
    code = f"import sys, keeptune.cli; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def recipe_fields() -> dict[str, type]:
    sections = [
        config.Recipe,
        config.DataFields,
        config.MixtureFields,
        config.TaskFields,
        config.MethodFields,
        config.TrainingFields,
        config.EvaluationFields,
        config.RetentionFields,
        config.HarnessFields,
        config.TextFields,
    ]
    return {f"{section.__name__}.{name}": section for section in sections for name in section.model_fields}


def test_a_recipe_has_at_most_ninety_fields() -> None:
    assert len(recipe_fields()) <= 90


def test_every_recipe_field_is_read_and_explained() -> None:
    here = ("config.py", "config_data.py")
    readers = "\n".join(p.read_text(encoding="utf-8") for p in MODULES if relative(p) not in here)
    explained = "\n".join((PACKAGE / name).read_text(encoding="utf-8") for name in here)
    for field in recipe_fields():
        name = field.split(".")[1]
        assert re.search(rf"\.{name}\b", readers), f"{field} is read by nothing"
        assert re.search(rf'^    {name}: .*(\n    .*)*?\n    """', explained, re.MULTILINE), (
            f"{field} has no line of its own"
        )
