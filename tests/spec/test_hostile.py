"""Two hundred ways to be wrong: each an InputError with file, line, key and what is allowed; nothing else, at once."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from codesign.errors import InputError
from codesign.spec.check import check_file
from codesign.spec.engine_config import FAMILIES, load_config
from codesign.spec.profile import load_profile
from codesign.spec.space import load_space
from codesign.spec.yaml import dump_yaml
from tests.spec.hostile import CONFIG, NOTHING, PROFILE, SPACE, cases
from tests.spec.test_yaml import REFUSED

LOADERS: dict[str, Callable[[Path], object]] = {"profile": load_profile, "space": load_space, "config": load_config}
KINDS = {"profile": "profile", "space": "search space", "config": "configuration"}
CASES = cases()


@pytest.fixture(autouse=True, scope="module")
def _members_are_imported() -> None:
    """What is timed is reading a file, not importing torch once."""
    for family in FAMILIES.values():
        for name in family.names():
            family.member(name)


def test_there_are_at_least_two_hundred() -> None:
    assert len(CASES) + len(REFUSED) >= 200


@pytest.mark.parametrize(("kind", "base"), [("profile", PROFILE), ("space", SPACE), ("config", CONFIG)])
def test_the_base_of_each_table_is_right(kind: str, base: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(dump_yaml(base))

    LOADERS[kind](path)
    assert check_file(path) == KINDS[kind]


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_named_with_file_line_key_and_hint(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "input.yaml"
    path.write_text(case.text)

    start = time.process_time()  # the machine may be busy with others
    with pytest.raises(InputError) as caught:
        LOADERS[case.kind](path)
    seconds = time.process_time() - start
    error = caught.value
    assert error.exit_status == 2
    assert (error.file or "").startswith(f"{path}:")
    assert (error.key or "").startswith(case.key)
    assert case.says in str(error)
    assert len(str(error)) < 1000
    assert seconds < 1


@pytest.mark.parametrize("name", CASES)
def test_check_says_what_the_loader_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "input.yaml"
    path.write_text(case.text)
    with pytest.raises(InputError) as from_loader:
        LOADERS[case.kind](path)

    with pytest.raises(InputError) as from_check:
        check_file(path)
    if case.kind == "profile" or from_check.value.key == from_loader.value.key:
        assert str(from_check.value) == str(from_loader.value)


@pytest.mark.parametrize("text", NOTHING)
@pytest.mark.parametrize("load", [load_profile, load_space, load_config, check_file])
def test_a_file_that_is_nothing_is_refused(load: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    path = tmp_path / "input.yaml"
    path.write_text(text)
    if text == "{}" and load in (load_space, load_config):
        load(path)  # nothing free, or all defaults: that is something
        return

    with pytest.raises(InputError) as caught:
        load(path)
    assert (caught.value.file or "").startswith(str(path))


@pytest.mark.parametrize("name", [name for name in REFUSED if "bottomless" not in name])
@pytest.mark.parametrize("load", [load_profile, load_space, load_config, check_file])
def test_what_is_not_yaml_is_refused_by_every_loader(load: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    path = tmp_path / "input.yaml"
    data = REFUSED[name][0]
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))

    with pytest.raises(InputError) as caught:
        load(path)
    assert (caught.value.file or "").startswith(str(path))
