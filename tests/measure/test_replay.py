"""Replay: lengths, arrivals and shared beginnings as in the trace, cut where asked, said in the record."""

import json
from pathlib import Path
from typing import Any

import pytest

from codesign.measure.replay import Replay
from codesign.measure.requests import make_load
from codesign.measure.tokens import RandomTokens
from codesign.spec.workload import Workload
from codesign.spec.workload_files import read_workload
from codesign.spec.yaml import parse_yaml
from tests.measure.test_requests import common, prompts

TOKENS = RandomTokens(10**6)
ROWS = [  # (seconds, prompt, output)
    (0, 40, 3),
    (2, 600, 5),
    (3, 30, 0),
]
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2024-05-10 00:00:0{second},{prompt},{output}\n" for second, prompt, output in ROWS
)
HASHES = [(1100, [1, 2, 3]), (1500, [1, 2, 9]), (700, [1, 7]), (50, [8]), (1100, [1, 2, 3])]
MOONCAKE = "".join(
    json.dumps({"timestamp": 1000 * i, "input_length": n, "output_length": 4, "hash_ids": ids}) + "\n"
    for i, (n, ids) in enumerate(HASHES)
)
SHAREGPT = json.dumps(
    [
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for question, answer in (("one two three", "four five"), ("six " * 40, "seven"))
    ]
)


def encode(text: str) -> list[int]:
    return [sum(word.encode()) for word in text.split()]


def workload(folder: Path, name: str, text: str, trace: dict[str, Any] | None = None, **changes: Any) -> Workload:
    (folder / name).write_text(text)
    plain = {"scenario": "server", "num_requests": 3, "trace": {"file": name, **(trace or {})}, **changes}
    return read_workload(parse_yaml(json.dumps(plain), file=str(folder / "w.yaml")))


def replay(asked: Workload, *, with_tokenizer: bool = True) -> Replay:
    assert asked.trace is not None
    return Replay(asked.trace, encode=encode if with_tokenizer else None, seed=asked.seed)


def test_lengths_and_arrivals_are_those_of_the_trace(tmp_path: Path) -> None:
    asked = workload(tmp_path, "t.csv", AZURE)
    load = make_load(asked, TOKENS, block=0, replay=replay(asked))

    assert [len(prompt) for prompt in prompts(load)] == [40, 600, 30]
    assert [request.sampling.max_tokens for request in load.requests] == [3, 5, 1]
    assert load.arrivals_s == (0.0, 2.0, 3.0)


def test_the_clock_of_a_trace_can_run_faster(tmp_path: Path) -> None:
    asked = workload(tmp_path, "t.csv", AZURE, {"speed": 10})

    assert make_load(asked, TOKENS, block=0, replay=replay(asked)).arrivals_s == (0.0, 0.2, 0.3)


def test_arrivals_can_be_ours_with_the_lengths_of_the_trace(tmp_path: Path) -> None:
    asked = workload(tmp_path, "t.csv", AZURE, arrival={"process": "constant", "rate_per_s": 4})
    load = make_load(asked, TOKENS, block=0, replay=replay(asked))

    assert load.arrivals_s == (0.0, 0.25, 0.5)
    assert [len(prompt) for prompt in prompts(load)] == [40, 600, 30]


def test_blocks_go_on_through_the_trace_and_around_its_end(tmp_path: Path) -> None:
    asked = workload(tmp_path, "t.csv", AZURE, num_requests=2)
    player = replay(asked)
    loads = [make_load(asked, TOKENS, block=block, replay=player) for block in range(3)]

    assert [[len(prompt) for prompt in prompts(load)] for load in loads] == [[40, 600], [30, 40], [600, 30]]
    # From the last request to the first of the next pass there is a mean gap, of 1.5 s here.
    assert [load.arrivals_s for load in loads] == [(0.0, 2.0), (0.0, 1.5), (0.0, 1.0)]
    assert len({prompt for load in loads for prompt in prompts(load)}) == 6


def test_caps_cut_and_the_record_says_how_many(tmp_path: Path) -> None:
    asked = workload(tmp_path, "t.csv", AZURE, {"max_prompt_tokens": 35, "max_output_tokens": 4})
    player = replay(asked)
    load = make_load(asked, TOKENS, block=0, replay=player)

    assert asked.max_model_len == 35 + 4
    assert [len(prompt) for prompt in prompts(load)] == [35, 35, 30]
    assert [request.sampling.max_tokens for request in load.requests] == [3, 4, 1]
    whole = {"num_requests": 3, "num_used": 3, "prompts_cut": 2, "outputs_cut": 1, "outputs_raised_to_1": 1}
    assert player.facts(100) == whole
    assert player.facts(1) == {**whole, "num_used": 1, "prompts_cut": 1, "outputs_cut": 0, "outputs_raised_to_1": 0}


def test_equal_hashes_are_equal_beginnings_by_blocks_of_512(tmp_path: Path) -> None:
    asked = workload(tmp_path, "t.jsonl", MOONCAKE, num_requests=5)
    made = prompts(make_load(asked, TOKENS, block=0, replay=replay(asked)))

    assert [len(prompt) for prompt in made] == [length for length, _ in HASHES]
    assert common(made[0], made[1]) == 1024
    assert common(made[0], made[2]) == 512
    assert common(made[0], made[3]) == 0
    assert made[4] == made[0]


def test_a_cut_prompt_keeps_its_shared_beginning(tmp_path: Path) -> None:
    asked = workload(tmp_path, "t.jsonl", MOONCAKE, {"max_prompt_tokens": 1030}, num_requests=2)
    made = prompts(make_load(asked, TOKENS, block=0, replay=replay(asked)))

    assert common(*made) == 1024


def test_a_second_pass_and_warm_ups_share_nothing_with_the_first(tmp_path: Path) -> None:
    asked = workload(tmp_path, "t.jsonl", MOONCAKE, num_requests=5)
    player = replay(asked)
    blocks = [(0, None), (1, None), (-1, -1), (-2, -1)]
    first = [prompts(make_load(asked, TOKENS, block=b, lengths_of=of, replay=player))[0] for b, of in blocks]

    assert len({prompt[:3] for prompt in first}) == 4
    assert len({len(prompt) for prompt in first}) == 1


def test_texts_are_sent_as_the_tokenizer_has_them(tmp_path: Path) -> None:
    caps = {"max_prompt_tokens": 20, "max_output_tokens": 10}
    asked = workload(tmp_path, "t.json", SHAREGPT, caps, scenario="offline", num_requests=2)
    player = replay(asked)
    load = make_load(asked, TOKENS, block=0, replay=player)

    assert prompts(load) == [tuple(encode("one two three")), tuple(encode("six " * 20))]
    assert [request.sampling.max_tokens for request in load.requests] == [2, 1]
    assert player.facts(2)["prompts_cut"] == 1
    again = prompts(make_load(asked, TOKENS, block=1, replay=player))
    assert [len(prompt) for prompt in again] == [3, 20]
    assert not {prompt[:1] for prompt in again} & {prompt[:1] for prompt in prompts(load)}


def test_texts_without_a_tokenizer_give_their_lengths(tmp_path: Path) -> None:
    caps = {"max_prompt_tokens": 20, "max_output_tokens": 10}
    asked = workload(tmp_path, "t.json", SHAREGPT, caps, scenario="offline", num_requests=2)
    load = make_load(asked, TOKENS, block=0, replay=replay(asked, with_tokenizer=False))

    assert [len(prompt) for prompt in prompts(load)] == [-(-13 // 4), 20]
    assert [request.sampling.max_tokens for request in load.requests] == [3, 2]


@pytest.mark.parametrize("text", [AZURE, MOONCAKE])
def test_a_seed_fixes_the_contents_and_another_changes_them(tmp_path: Path, text: str) -> None:
    name = "t.csv" if text == AZURE else "t.jsonl"
    made = []
    for seed in (1, 1, 2):
        asked = workload(tmp_path, name, text, seed=seed)
        made.append(make_load(asked, TOKENS, block=0, replay=replay(asked)))

    assert made[0] == made[1]
    assert prompts(made[0]) != prompts(made[2])
    assert made[0].arrivals_s == made[2].arrivals_s


def test_a_trace_of_one_request_repeats(tmp_path: Path) -> None:
    asked = workload(tmp_path, "t.csv", AZURE.rsplit("\n", 3)[0] + "\n")
    load = make_load(asked, TOKENS, block=0, replay=replay(asked))

    assert load.arrivals_s == (0.0, 0.0, 0.0)
    assert len(set(prompts(load))) == 3
