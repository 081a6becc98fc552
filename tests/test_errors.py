import pytest

from codesign.errors import CodesignError, InputError, Unsupported, WorkError, nearest, shown


def test_the_text_is_file_key_message_hint() -> None:
    error = InputError("unknown KV policy 'snapvk'", file="a.yaml:3", key="kv", got="snapvk", known=["snapkv", "full"])

    assert str(error) == "a.yaml:3: kv: unknown KV policy 'snapvk'; did you mean 'snapkv'? (known: full, snapkv)"
    assert (error.file, error.key) == ("a.yaml:3", "kv")


def test_a_caller_who_knows_the_place_can_say_it_again() -> None:
    inner = InputError("unknown key", key="b", got="x", known=["y"])

    assert str(InputError(inner.message, file="f", key="a.b")) == "f: a.b: unknown key (known: y)"


def test_parts_that_are_not_known_are_left_out() -> None:
    assert str(InputError("wrong")) == "wrong"
    assert str(InputError("wrong", key="a")) == "a: wrong"


@pytest.mark.parametrize(("kind", "status"), [(InputError, 2), (Unsupported, 2), (WorkError, 1), (CodesignError, 1)])
def test_each_error_has_its_exit_status(kind: type[CodesignError], status: int) -> None:
    assert kind("text").exit_status == status


@pytest.mark.parametrize(
    ("got", "near"), [("snapvk", "snapkv"), ("SNAPKV", "snapkv"), ("H2O", "h2o"), ("zzz", None), ("", None)]
)
def test_the_nearest_name_is_found_whatever_its_case(got: str, near: str | None) -> None:
    assert nearest(got, ["full", "h2o", "snapkv"]) == near


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "nothing"), (True, "true"), ("a\u202eb\n", "'a\\u202eb\\n'"), ("x" * 500, "'" + "x" * 76 + "...")],
)
def test_values_are_shown_short_and_escaped(value: object, text: str) -> None:
    assert shown(value) == text
