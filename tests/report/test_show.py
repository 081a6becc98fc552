import json

import pytest

from codesign.report.show import (
    interval,
    listed,
    number,
    quantity,
    script_json,
    signed,
    spoken,
    spreadsheet_cell,
    visible,
    visible_deep,
)
from codesign.spec.metrics import METRICS


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.05, "0.05"),
        (0.00012345, "0.000123"),
        (1.4249, "1.42"),
        (99.94, "99.9"),
        (99.96, "100"),
        (999.9, "1,000"),
        (123456.7, "123,457"),
        (12345678, "1.23e+07"),
        (-1234.5, "-1,234"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_show_three_figures_and_no_surprising_exponent(value: float, shown: str) -> None:
    assert number(value) == shown


def test_bytes_are_shown_in_binary_units_and_other_units_as_they_are() -> None:
    assert quantity(17.5 * 2**20, "bytes") == "17.5 MiB"
    assert quantity(412.3, "tokens/s") == "412 tokens/s"
    assert interval(2**20, 2**21, "bytes") == "[1 MiB–2 MiB]"
    assert interval(None, 3.0) == ""


def test_signed_effects_use_a_real_minus() -> None:
    assert [signed(0.5), signed(-0.25), signed(0.0)] == ["+0.5", "−0.25", "0"]


def test_invisible_characters_become_escapes_and_others_stay() -> None:
    assert visible("a\x1b[31mb\x00\u202ec\ud800\r\nd\te\u2028") == "a\\x1b[31mb\\x00\\u202ec\\ud800\nd\te\u2028"


def test_text_inside_plain_data_is_made_visible_keys_included() -> None:
    assert visible_deep({"a\x00": ["\x07", {"b": 1, "c": None}]}) == {"a\\x00": ["\\x07", {"b": 1, "c": None}]}


def test_embedded_json_cannot_leave_its_element_and_reads_back_equal() -> None:
    plain = {"</script><!--": "<script>&\u2028\u2029]]>", "list": [1.5, None, True]}

    text = script_json(plain)

    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == plain


def test_embedded_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        script_json({"value": float("nan")})


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\n=1", " =1", "＝1", "－1"])
def test_a_cell_that_a_spreadsheet_would_run_is_prefixed(text: str) -> None:
    assert str(spreadsheet_cell(text)).startswith("'")


def test_numbers_and_plain_text_stay_as_they_are_in_a_cell() -> None:
    assert spreadsheet_cell(-1.5) == -1.5
    assert spreadsheet_cell("weights int4 (group_size 64)") == "weights int4 (group_size 64)"


def test_every_metric_has_a_spoken_name_without_unit() -> None:
    for name in METRICS:
        assert "_" not in spoken(name)
        assert not spoken(name).endswith(" ms")


def test_lists_read_as_a_sentence() -> None:
    assert [listed([]), listed(["a"]), listed(["a", "b", "c"])] == ["nothing", "a", "a, b and c"]
