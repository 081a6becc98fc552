"""Traces: what each format comes to, and what is wrong with a file, named by line and key. Fixtures are made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from codesign.errors import InputError
from codesign.spec import trace as traces
from codesign.spec.trace import Trace, read_trace, requests_digest
from codesign.spec.traces import sharegpt
from codesign.spec.traces.request import TraceRequest

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.9799600,110,27

2024-05-10 00:00:00.009930+00:00,7,0
"""
MOONCAKE = "\n".join(
    [
        '{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [46, 47]}',
        '{"timestamp": 0, "input_length": 600, "output_length": 6, "hash_ids": [46, 9]}',
        '{"timestamp": 3000, "input_length": 10, "output_length": 7}',
    ]
)
SHAREGPT: list[dict[str, Any]] = [
    {"id": "a", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi! \ud83d"}]},
    {"id": "b", "conversations": [{"from": "human", "value": "alone"}]},
    {"id": "c", "conversations": []},
    {
        "conversations": [
            {"from": "gpt", "value": "x"},
            {"from": "user", "value": "é"},
            {"from": "assistant", "value": "y"},
        ]
    },
]
CAPS = {"max_prompt_tokens": 100, "max_output_tokens": 10}


def read(folder: Path, name: str, text: str, **keys: Any) -> tuple[TraceRequest, ...]:
    (folder / name).write_text(text)
    return read_trace(Trace.model_validate({"file": name, **keys}), folder)


def test_an_azure_trace_has_times_and_lengths(tmp_path: Path) -> None:
    found = read(tmp_path, "t.csv", AZURE)

    assert [(request.prompt_tokens, request.output_tokens) for request in found] == [(4808, 10), (110, 27), (7, 0)]
    assert found[1].arrival_s - found[0].arrival_s == pytest.approx(1.0)  # type: ignore[operator]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    [found] = read(tmp_path, "t.csv", "\ufeffx,GeneratedTokens,ContextTokens,TIMESTAMP\nq,1,2,2024-05-10\n")

    assert (found.prompt_tokens, found.output_tokens) == (2, 1)


def test_a_mooncake_trace_is_ordered_by_time_and_keeps_its_hashes(tmp_path: Path) -> None:
    found = read(tmp_path, "t.jsonl", MOONCAKE)

    assert [request.arrival_s for request in found] == [0.0, 3.0, 3.0]
    assert [request.hash_ids for request in found] == [(46, 9), (46, 47), ()]
    assert [request.output_tokens for request in found] == [6, 5, 7]


@pytest.mark.parametrize("piece_bytes", [1, 7, 2**20])
def test_a_sharegpt_file_gives_the_first_question_with_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    """Whatever the pieces in which the file is read, also through the middle of a character."""
    monkeypatch.setattr(sharegpt, "_PIECE_BYTES", piece_bytes)
    text = json.dumps(SHAREGPT[:3])[:-1] + " , " + json.dumps(SHAREGPT[3], ensure_ascii=False) + "\n]\n"
    found = read(tmp_path, "t.json", text, **CAPS)

    assert [(request.prompt_text, request.output_text) for request in found] == [("Hello", "Hi! ?"), ("é", "y")]


def test_no_more_is_read_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_REQUESTS", 2)

    assert len(read(tmp_path, "t.csv", AZURE + "not,a,row\n")) == 2


def test_a_trace_that_has_changed_is_refused(tmp_path: Path) -> None:
    digest = requests_digest(read(tmp_path, "t.csv", AZURE))

    assert read(tmp_path, "t.csv", AZURE, digest=digest)
    with pytest.raises(InputError, match="has changed"):
        read(tmp_path, "t.csv", AZURE.replace("4808", "4809"), digest=digest)


def mooncake(**changes: Any) -> str:
    plain = {"timestamp": 0, "input_length": 5, "output_length": 5, **changes}
    good = json.dumps({"timestamp": 0, "input_length": 5, "output_length": 5})
    return good + "\n" + json.dumps({key: value for key, value in plain.items() if value != "gone"})


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
WRONG: dict[str, tuple[str, str, str, str, str]] = {  # name -> (file, text, line, key, what it says)
    "an empty csv": ("t.csv", "", "", "TIMESTAMP", "must name the column"),
    "no row": ("t.csv", HEAD, "", "", "holds no request"),
    "another header": ("t.csv", "a,b\n1,2\n", "1", "TIMESTAMP", "must name the column TIMESTAMP once"),
    "a column twice": ("t.csv", "TIMESTAMP,TIMESTAMP,ContextTokens,GeneratedTokens\n", "1", "TIMESTAMP", "once"),
    "a short row": ("t.csv", HEAD + "2024-01-01,5\n", "2", "", "has 2 columns, the first line 3"),
    "no time": ("t.csv", HEAD + "noon,5,5\n", "2", "TIMESTAMP", "must be a date and time, got 'noon'"),
    "a year too far": ("t.csv", HEAD + "99999-01-01,5,5\n", "2", "TIMESTAMP", "date and time"),
    "no length": ("t.csv", HEAD + "2024-01-01,many,5\n", "2", "ContextTokens", "whole number from 1"),
    "an empty prompt": ("t.csv", HEAD + "2024-01-01,0,5\n", "2", "ContextTokens", "whole number from 1"),
    "a negative length": ("t.csv", HEAD + "2024-01-01,5,-5\n", "2", "GeneratedTokens", "whole number from 0"),
    "digits of another script": ("t.csv", HEAD + "2024-01-01,5,٣\n", "2", "GeneratedTokens", "whole number"),
    "a length without end": ("t.csv", HEAD + f"2024-01-01,{'9' * 9999},5\n", "2", "ContextTokens", "whole number"),
    "a line without end": ("t.csv", HEAD + "x" * (2**20 + 2), "2", "", "longer than 1024 KiB"),
    "no JSON": ("t.jsonl", mooncake() + "\n{", "3", "", "is not JSON"),
    "NaN": ("t.jsonl", mooncake(timestamp=float("nan")), "2", "", "NaN is not allowed"),
    "a deep line": ("t.jsonl", "[" * 100_000, "1", "", "is not JSON"),
    "a huge number": ("t.jsonl", mooncake() + '\n{"timestamp": ' + "9" * 5000 + "}", "3", "", "is not JSON"),
    "a list": ("t.jsonl", "[]", "1", "", "must be a mapping"),
    "a missing key": ("t.jsonl", mooncake(output_length="gone"), "2", "output_length", "is missing"),
    "a length that is text": ("t.jsonl", mooncake(input_length="5"), "2", "input_length", "whole number from 1"),
    "a length that is true": ("t.jsonl", mooncake(output_length=True), "2", "output_length", "got true"),
    "a length too long": ("t.jsonl", mooncake(output_length=10**9), "2", "output_length", "to 16777216"),
    "a time before all": ("t.jsonl", mooncake(timestamp=-1), "2", "timestamp", "milliseconds"),
    "hashes that are none": ("t.jsonl", mooncake(hash_ids=["a"]), "2", "hash_ids", "list of whole numbers"),
    "an empty json": ("t.json", "", "", "", "must be a JSON list"),
    "a mapping": ("t.json", "{}", "", "", "must be a JSON list"),
    "an empty list": ("t.json", "[]", "", "[0]", "must be a mapping"),
    "a number in the list": ("t.json", "[5]", "", "[0]", "must be a mapping, got '5'"),
    "a list that does not end": ("t.json", json.dumps(SHAREGPT)[:-1], "", "[3]", "comma or the end"),
    "half a conversation": ("t.json", json.dumps(SHAREGPT)[:-20], "", "[3]", "is not JSON"),
    "two without a comma": ("t.json", '[{"conversations": []} {}]', "", "[0]", "comma"),
    "a deep document": ("t.json", '[{"a": ' + "[" * 100_000, "", "[0]", "not JSON"),
    "no conversations": ("t.json", "[{}]", "", "[0].conversations", "must be a list of turns"),
    "a turn that is none": ("t.json", '[{"conversations": [5]}]', "", "[0].conversations[0]", "texts from and value"),
    "only monologues": ("t.json", json.dumps(SHAREGPT[1:3]), "", "", "holds no request"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_a_trace_is_named_with_line_and_key(name: str, tmp_path: Path) -> None:
    file, text, line, key, says = WRONG[name]
    with pytest.raises(InputError) as caught:
        read(tmp_path, file, text, **CAPS)

    error = caught.value
    assert error.file == f"{tmp_path / file}" + (f":{line}" if line else "")
    assert (error.key or "") == key
    assert says in error.message
    assert len(str(error)) < 1000


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for name in ("t.csv", "t.jsonl", "t.json"):
        (tmp_path / name).write_bytes(b"[{\xff\xfe\n")
        with pytest.raises(InputError, match="not UTF-8"):
            read_trace(Trace.model_validate({"file": name, **CAPS}), tmp_path)


def test_a_conversation_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharegpt, "_PIECE_BYTES", 2**10)
    monkeypatch.setattr(sharegpt, "_MAX_CHARACTERS", 2**12)
    (tmp_path / "t.json").write_text('[{"conversations": "' + "x" * 2**20)

    with open(tmp_path / "t.json", "rb") as stream:
        with pytest.raises(InputError, match="not JSON"):
            list(sharegpt.requests(stream, "t.json"))
        assert stream.tell() <= 2**14
