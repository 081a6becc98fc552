"""The architecture page that cannot go stale: which stage may import which, as data, checked on the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "codesign"

# Each stage may import itself and what stands in its list.
BASE = {"registry", "errors", "units"}
SPEC = BASE | {"spec"}
RESULTS = SPEC | {"results"}
PREDICT = RESULTS | {"predict"}
DATA = {"bundled"}
ENGINE = PREDICT | DATA | {"engine"}
DEPLOY = ENGINE | {"serve", "deploy"}
MEASURE = DEPLOY | {"measure"}
REPORT = PREDICT | {"report"}
SEARCH = MEASURE | REPORT | {"search"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "registry": {"errors"},
    "bundled": DATA,
    "spec": SPEC | DATA,
    "results": RESULTS,
    "predict": PREDICT,
    "engine": ENGINE,
    "serve": ENGINE | {"serve"},
    "deploy": DEPLOY,
    "measure": MEASURE,
    "report": REPORT,
    "search": SEARCH,
    "cli": SEARCH | {"cli"},
}
# Scripts that make the bundled model stand at the level of the command line.
CLI_LEVEL = {
    "bundled/corpus.py",
    "bundled/tokenizer.py",
    "bundled/train.py",
    "bundled/distill.py",
    "bundled/evaluate.py",
}
HEAVY = {"torch", "optuna", "transformers"}
WITHOUT_HEAVY = {"errors", "units", "registry", "spec", "results", "predict", "report"}


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module == "codesign":
                found |= {f"codesign.{alias.name}" for alias in node.names}
    return found


def stage(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "cli" if str(relative) in CLI_LEVEL else relative.parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    allowed = ALLOWED[stage(path)] | {stage(path)}
    used = {name.split(".")[1] for name in imports(path) if name.startswith("codesign.")}

    assert used - {"__version__"} <= allowed


@pytest.mark.parametrize(
    "path", [path for path in FILES if stage(path) in WITHOUT_HEAVY], ids=lambda path: str(path.relative_to(ROOT))
)
def test_light_stages_never_load_heavy_packages(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & HEAVY
