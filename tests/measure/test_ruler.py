"""Laws of the RULER-like samples: each has one answer, told where the task says, in exactly the asked length."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codesign.bundled import heldout_texts, target_path
from codesign.engine.models.tokenizer import Tokenizer
from codesign.measure.ruler import (
    NUM_COMMON,
    NUM_HOPS,
    NUM_KEYS,
    NUM_VALUES,
    OUTPUT_TOKENS,
    TASKS,
    RulerSample,
    ruler_sample,
)

TOKENIZER = Tokenizer(target_path())
FILLER = [token for document in heldout_texts()[:12] for token in TOKENIZER.encode(document.text)]
LENGTHS = (256, 512, 1024)
LINE = re.compile(r"^# key (\w+) = (\w+)$", re.MULTILINE)


def sample(task: str, *, length_tokens: int = 512, seed: int = 0) -> RulerSample:
    return ruler_sample(task, TOKENIZER.encode, FILLER, length_tokens=length_tokens, seed=seed)


def told(found: RulerSample) -> list[tuple[str, str]]:
    """(name, what it was told to be), in order."""
    return LINE.findall(TOKENIZER.decode(found.prompt_ids))


def answer_of(found: RulerSample) -> str:
    return TOKENIZER.decode(found.answer_ids)


def asked_name(found: RulerSample) -> str:
    return TOKENIZER.decode(found.prompt_ids).rsplit("# recall ", 1)[1].removesuffix(" = ")


cases = given(st.sampled_from(sorted(TASKS)), st.sampled_from(LENGTHS), st.integers(0, 10**6))


@cases
@settings(max_examples=60, deadline=None)
def test_prompt_and_answer_have_exactly_the_asked_length(task: str, length_tokens: int, seed: int) -> None:
    found = sample(task, length_tokens=length_tokens, seed=seed)

    assert len(found.prompt_ids) + len(found.answer_ids) == length_tokens


@cases
@settings(max_examples=60, deadline=None)
def test_same_arguments_give_the_same_sample(task: str, length_tokens: int, seed: int) -> None:
    found = sample(task, length_tokens=length_tokens, seed=seed)

    assert found == sample(task, length_tokens=length_tokens, seed=seed)
    assert found != sample(task, length_tokens=length_tokens, seed=seed + 1)


@cases
@settings(max_examples=60, deadline=None)
def test_the_answer_follows_from_the_lines_and_nothing_else_does(task: str, length_tokens: int, seed: int) -> None:
    """Solved anew from the text by each task's own rule: exactly one number is left, and it is the answer."""
    found = sample(task, length_tokens=length_tokens, seed=seed)
    lines, name = told(found), asked_name(found)
    if task in ("single_needle", "multi_key"):
        left = [value for told_name, value in lines if told_name == name]
    elif task == "multi_value":
        said = re.findall(rf"# recall {name} = (\d+)", TOKENIZER.decode(found.prompt_ids))
        left = [value for told_name, value in lines if told_name == name and value not in said]
    elif task == "variable_tracking":
        values = dict(lines)
        assert len(values) == len(lines), "a name is told once"
        hops = 0
        while not values[name].isdigit():
            name, hops = values[name], hops + 1
        assert hops == NUM_HOPS
        left = [values[name]]
    else:
        (common, count), *others = Counter(value for _, value in lines).most_common()
        assert count == NUM_COMMON and others and {other for _, other in others} == {1}
        left = [common]

    assert left == [answer_of(found)]


@cases
@settings(max_examples=60, deadline=None)
def test_no_distractor_and_no_filler_says_the_answer(task: str, length_tokens: int, seed: int) -> None:
    found = sample(task, length_tokens=length_tokens, seed=seed)
    answer = answer_of(found)
    without_lines = LINE.sub("", TOKENIZER.decode(found.prompt_ids))

    assert sum(value == answer for _, value in told(found)) == (NUM_COMMON if task == "common_words" else 1)
    assert answer not in without_lines


@cases
@settings(max_examples=60, deadline=None)
def test_what_is_forced_as_output_tells_nothing(task: str, length_tokens: int, seed: int) -> None:
    found = sample(task, length_tokens=length_tokens, seed=seed)
    output = found.prompt_ids[found.num_context_tokens :]
    question = TOKENIZER.decode(output).split("\n# recall ")[0]

    assert len(output) > OUTPUT_TOKENS
    assert not LINE.search(TOKENIZER.decode(output))
    assert len(TOKENIZER.encode(question)) >= OUTPUT_TOKENS - 2  # two tokens may join when encoded anew


@pytest.mark.parametrize(
    ("task", "count"), [("single_needle", 1), ("multi_key", NUM_KEYS), ("multi_value", NUM_VALUES)]
)
def test_a_task_tells_as_many_lines_as_it_says(task: str, count: int) -> None:
    assert len(told(sample(task))) == count


def test_lines_lie_at_all_depths() -> None:
    depths = []
    for seed in range(40):
        found = sample("single_needle", seed=seed)
        text = TOKENIZER.decode(found.prompt_ids)
        depths.append(text.index("# key ") / len(text))

    assert min(depths) < 0.15 and max(depths) > 0.65
    assert 0.3 < sum(depths) / len(depths) < 0.6


def test_common_words_fill_the_prompt() -> None:
    assert len(told(sample("common_words", length_tokens=1024))) > 1.8 * len(told(sample("common_words")))


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_cannot_hold_the_lines_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        sample(task, length_tokens=70)


def test_too_short_filler_is_refused() -> None:
    with pytest.raises(ValueError, match="filler tokens"):
        ruler_sample("single_needle", TOKENIZER.encode, FILLER[:100], length_tokens=512, seed=0)


def test_filler_that_says_the_answer_everywhere_is_refused() -> None:
    answer = sample("single_needle").answer_ids

    with pytest.raises(ValueError, match="holds the answer"):
        ruler_sample("single_needle", TOKENIZER.encode, answer * 200, length_tokens=512, seed=0)
