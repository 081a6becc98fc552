"""What the README and the shipped YAML promise, checked against the program."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from codesign.spec.check import check_file

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.partition("#")[0].split() for line in README.splitlines() if line.startswith("codesign ")]
SHIPPED = sorted([*ROOT.glob("profiles/*.yaml"), *ROOT.glob("search_spaces/*.yaml")])


def help_of(*verb: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "codesign", *verb, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "TERM": "dumb", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )
    return done.stdout


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return {verb: help_of(verb) for verb in {command[1] for command in COMMANDS}}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_of_the_readme_exist_with_their_options(command: list[str], helps: dict[str, str]) -> None:
    for option in (word for word in command if word.startswith("--")):
        assert option in helps[command[1]]


def test_every_verb_is_in_the_readme() -> None:
    verbs = re.findall(r"^  ([a-z]+)  ", help_of(), flags=re.MULTILINE)

    assert verbs
    assert {command[1] for command in COMMANDS} == set(verbs)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_yaml_is_valid(path: Path) -> None:
    assert check_file(path) in ("profile", "search space")


def test_paths_named_in_the_readme_exist() -> None:
    named = re.findall(r"`?(?:profiles|search_spaces|codesign)/[\w./-]+", README)
    paths = {name.strip("`").rstrip(".") for name in named}

    assert not [path for path in paths if not (ROOT / path).exists()]


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()

    assert targets >= {"demo", "test", "check"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
