import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.errors import InputError
from codesign.spec import yaml
from codesign.spec.yaml import dump_yaml, load_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("True", "True"),
        ("true", True),
        ("false", False),
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("0o17", 15),
        ("0x1F", 31),
        ("012", 12),
        ("-7", -7),
        ("+7", 7),
        ("1_000", "1_000"),
        ("0b101", "0b101"),
        ("2001-01-01", "2001-01-01"),
        ("12:30:45", "12:30:45"),
        ("~", None),
        ("null", None),
        ("", None),
        ("Null", None),
        ("'12'", "12"),
        ('"true"', "true"),
        ("int4", "int4"),
        ("9223372036854775807", 2**63 - 1),
        ("0x", "0x"),
        ("1e", "1e"),
        ("é", "é"),
    ],
)
def test_scalars_follow_the_yaml_1_2_core_rules(text: str, value: Any) -> None:
    found = parse_yaml(f"key: {text}").value["key"]

    assert found == value
    assert type(found) is type(value)


REFUSED: dict[str, tuple[str | bytes, int, str]] = {
    # name: (text, line, what the message says)
    "duplicate key": ("a: 1\nb: 2\na: 3", 3, "line 1"),
    "duplicate key quoted": ("a: 1\n'a': 3", 2, "given once"),
    "infinity": ("a: .inf", 1, "finite"),
    "negative infinity": ("a:\n  b: -.INF", 2, "finite"),
    "not a number": ("a: .NaN", 1, "finite"),
    "float overflow": ("a: 1e999", 1, "out of range"),
    "int over 64 bits": ("a: 9223372036854775808", 1, "64 bits"),
    "int of 5000 digits": ("a: " + "9" * 5000, 1, "64 bits"),
    "hex over 64 bits": ("a: 0x" + "F" * 30, 1, "64 bits"),
    "python object tag": ("a: !!python/object/apply:os.system [ls]", 1, "tags"),
    "python name tag": ("a: !!python/name:os.system", 1, "tags"),
    "str tag": ("a: !!str 5", 1, "tags"),
    "binary tag": ("a: !!binary aGk=", 1, "tags"),
    "custom tag": ("a: !mine 5", 1, "tags"),
    "verbatim tag": ("a: !<tag:x,2000:y> 5", 1, "tags"),
    "non-specific tag": ("a: ! 5", 1, "tags"),
    "tag on a mapping": ("a: !!omap {b: 1}", 1, "tags"),
    "tag on a key": ("!!str a: 1", 1, "plain name"),
    "tag directive": ("%TAG ! tag:x,2000:\n---\na: 1", 1, "tags"),
    "yaml 1.1 directive": ("%YAML 1.1\n---\na: 1", 1, "YAML 1.2"),
    "yaml 3 directive": ("%YAML 3.0\n---\na: 1", 1, "version"),
    "two documents": ("a: 1\n---\nb: 2", 2, "more than one document"),
    "document after end": ("a: 1\n...\n---\nb: 2", 3, "more than one document"),
    "text after end": ("--- a\n...\nb: 1", 3, "not YAML"),
    "alias of itself": ("a: &x [*x]", 1, "contains itself"),
    "alias of its mapping": ("a: &x\n  b: *x", 2, "contains itself"),
    "alias without anchor": ("a: *nobody", 1, "no anchor"),
    "anchor twice": ("a: &x 1\nb: &x 2", 2, "defined twice"),
    "anchor on a key": ("&x a: 1", 1, "plain name"),
    "alias as a key": ("a: &x b\n*x : 1", 2, "plain name"),
    "number as a key": ("a: 1\n12: 2", 2, "must be a name"),
    "boolean as a key": ("true: 2", 1, "must be a name"),
    "null as a key": ("~: 2", 1, "must be a name"),
    "list as a key": ("[a]: 2", 1, "plain name"),
    "mapping as a key": ("? {a: 1}\n: 2", 1, "plain name"),
    "tab as indentation": ("a:\n\tb: 1", 2, "tab"),
    "tab in front": ("\ta: 1", 1, "tab"),
    "utf-16": ("a: 1".encode("utf-16"), 1, "UTF-8"),
    "utf-32": ("a: 1".encode("utf-32"), 1, "UTF-8"),
    "latin-1": (b"a: 1\nb: caf\xe9", 2, "UTF-8"),
    "overlong utf-8": (b"a: \xc0\x80", 1, "UTF-8"),
    "surrogate bytes": (b"a: \xed\xa0\x80", 1, "UTF-8"),
    "elf file": (b"\x7fELF\x02\x01\x01\x00\x00", 1, "control character"),
    "gzip file": (b"\x1f\x8b\x08\x00", 1, "UTF-8"),
    "nul byte": (b"a: 1\n\nb: \x00", 3, "control character"),
    "escape sequence": ("a: \x1b[31mred", 1, "control character"),
    "carriage return alone": ("a: 1\rb: 2", 1, "control character"),
    "escaped nul": ('a: "\\0"', 1, "control character"),
    "escaped surrogate": ('a: "\\ud800"', 1, "control character"),
    "escape past unicode": ('a: "\\U00110000"', 0, "not YAML"),
    "escape far past unicode": ('a: "\\UFFFFFFFF"', 0, "not YAML"),
    "unknown escape": ('a: "\\q"', 1, "escape"),
    "open quote": ("a: 'b", 1, "end of stream"),
    "open bracket": ("a: [1, 2", 1, "not YAML"),
    "open brace": ("a: {b: 1", 1, "not YAML"),
    "closing only": ("a: ]", 1, "not YAML"),
    "two colons": ("a: b: c", 1, "not YAML"),
    "at sign": ("a: @b", 1, "cannot start"),
    "percent sign": ("a: %b", 1, "cannot start"),
    "backtick": ("a: `b`", 1, "cannot start"),
    "bad indentation": ("a:\n    b: 1\n  c: 2", 3, "not YAML"),
    "list beside key": ("a: 1\n- b", 2, "not YAML"),
    "deep list": ("a: " + "[" * 60 + "]" * 60, 1, "deeper than 32"),
    "deep mapping": ("".join(" " * i + "a:\n" for i in range(60)), 34, "deeper than 32"),
    "bottomless list": ("[" * 100_000, 1, "deeper than 32"),
    "bottomless mapping": ("{a: " * 20_000, 1, "deeper than 32"),
    "bottomless sequence": ("- " * 50_000, 1, "deeper than 32"),
    "bottomless key": ("? " * 50_000, 1, "plain name"),
    "many values": ("[" + "1," * 60_000 + "]", 1, "more than 5000 values"),
    "too large": ("# " + "x" * yaml.MAX_BYTES, 0, "larger than 128 KiB"),
    "aliases past 100": ("a: &x [" + "1," * 50 + "]\nb: [*x, *x]", 2, "more than 100"),
    "deep by alias": ("a: &x " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*x" + "]" * 20, 2, "deeper than 32"),
    "alias bomb": (
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
        3,
        "more than 100",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_yaml_is_refused_with_file_and_line(name: str) -> None:
    text, line, says = REFUSED[name]

    start = time.process_time()
    with pytest.raises(InputError, match=says) as caught:
        parse_yaml(text, file="study.yaml")
    assert time.process_time() - start < 1  # the slowest takes 0.3 s of a Zen 3 core
    assert caught.value.exit_status == 2
    assert caught.value.file == (f"study.yaml:{line}" if line else "study.yaml")


SLOW_BUT_ALLOWED = {
    "a long comment": "#" * 100_000,
    "blank lines": "\n" * 100_000,
    "a long word": "a: " + "x" * 100_000,
    "many words": "a: " + "b " * 50_000,
    "a long quoted text": "a: '" + "y\n  " * 20_000 + "'",
    "a long block text": "a: |\n" + " x\n" * 30_000,
    "many keys": "".join(f"key{i}: value\n" for i in range(2_400)),
}


@pytest.mark.parametrize("name", SLOW_BUT_ALLOWED)
def test_the_largest_documents_are_read_in_bounded_time(name: str) -> None:
    start = time.process_time()
    parse_yaml(SLOW_BUT_ALLOWED[name])

    assert time.process_time() - start < 2  # measured: under 0.5 s on a quiet core


def test_a_small_alias_is_what_its_anchor_is() -> None:
    assert parse_yaml("a: &x {b: [1, 2]}\nc: *x").value == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_a_byte_order_mark_and_windows_lines_are_read() -> None:
    assert parse_yaml(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n").value == {"a": 1, "b": 2}


def test_an_empty_document_is_nothing() -> None:
    assert parse_yaml("# only a comment\n").value is None


def test_each_key_knows_its_line() -> None:
    document = parse_yaml("a:\n  b:\n  - 1\n  - c: 2\n", file="f")

    assert document.place(("a", "b", 1, "c")) == "f:4"
    assert document.place(("a", "b", 1, "missing")) == "f:4"
    assert document.place(("elsewhere",)) == "f:1"


def test_odd_characters_in_a_key_are_shown_escaped() -> None:
    assert "\u202e" not in str(parse_yaml("a: 1").error("unknown key", ("b\u202e",)))


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "device", "loop", "nul"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nul":
        path = tmp_path / "a\0b"

    with pytest.raises(InputError):
        load_yaml(path)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "cpu.yaml").touch()

    with pytest.raises(InputError, match=r"no such file \(in that folder: cpu.yaml\)"):
        load_yaml(tmp_path / "cpuu.yaml")


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t"), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.sampled_from(
        ["2:4", "on", "yes", "1e-4", "0o17", "0x1F", "~", ".inf", ".NaN", "1_000", "- a", "a: b", "<<", "="]
    )
)
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


@given(PLAIN)
def test_what_is_dumped_reads_back_equal(value: Any) -> None:
    found = parse_yaml(dump_yaml(value)).value

    assert found == value
    assert repr(found) == repr(value)  # types too: 1 is not 1.0 is not true


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**63, {1: 2}, "\x00", "\ud800", (1, 2), object(), {"a": b"b"}])
def test_what_would_not_read_back_is_not_dumped(value: Any) -> None:
    with pytest.raises(ValueError):
        dump_yaml({"key": value})


@given(st.text(max_size=60) | st.text("ab:- \n\t[]{},&*!|>'\"%@`#?~0123.e", max_size=60))
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    try:
        value = parse_yaml(text).value
    except InputError:
        return

    assert parse_yaml(dump_yaml(value)).value == value


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    try:
        parse_yaml(data)
    except InputError as error:
        assert error.file is not None
