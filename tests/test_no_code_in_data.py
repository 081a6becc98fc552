"""Data is never code: nothing in the package can unpickle, evaluate, or hand objects to another process."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "codesign"
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("torch", "multiprocessing"),
    ("builtins", "eval"),
    ("builtins", "exec"),
}
# A recipe that a person runs by hand: it forks workers of its own and resumes from the checkpoint that it wrote itself.
ALLOWED = {"bundled/parallel.py": {"torch.load", "torch.save", "torch.multiprocessing"}}


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = []
            found += [node.func.id] if node.func.id in CALLS else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = []
            found += [f"{node.value.id}.{node.attr}"] if (node.value.id, node.attr) in ATTRIBUTES else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            names = []
            is_refused = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if is_refused else ["allow_pickle"]
        else:
            continue
        found += [name for name in names if MODULES & set(name.split("."))]
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_turn_data_into_code(path: Path) -> None:
    assert set(offences(path.read_text())) == ALLOWED.get(str(path.relative_to(ROOT)), set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal as m",
        "from multiprocessing import Queue",
        "import torch.multiprocessing",
        "from torch import multiprocessing",
        "def f():\n    from dill import loads",
        "eval(text)",
        "x = [exec(line) for line in lines]",
        "compile(text, '', 'exec')",
        "torch.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
    ],
)
def test_the_scan_sees_each_way(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "numpy.load(path, allow_pickle=False)", "re.compile('a')", "torch.compile(f)"]
)
def test_the_scan_lets_the_innocent_pass(source: str) -> None:
    assert offences(source) == []
