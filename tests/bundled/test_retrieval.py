import pytest
from tokenizers import Tokenizer

from codesign.bundled import heldout_texts, target_path
from codesign.bundled.retrieval import RetrievalPrompt, retrieval_prompt

TOKENIZER = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
FILLER = TOKENIZER.encode("".join(document.text for document in heldout_texts()[:4])).ids


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def prompt_at(distance_tokens: int, seed: int = 3) -> RetrievalPrompt:
    return retrieval_prompt(encode, FILLER, distance_tokens=distance_tokens, seed=seed)


@pytest.mark.parametrize("distance_tokens", [64, 256, 1024])
def test_question_comes_the_asked_distance_after_the_told_line(distance_tokens: int) -> None:
    prompt = prompt_at(distance_tokens)
    name = TOKENIZER.decode(prompt.token_ids).rsplit("# recall ", 1)[1].removesuffix(" = ")
    told, question = encode(f"# key {name} = {prompt.answer}\n"), encode(f"# recall {name} = ")
    start = next(index for index in range(len(prompt.token_ids)) if prompt.token_ids[index : index + len(told)] == told)

    assert prompt.token_ids[-len(question) :] == question
    assert len(prompt.token_ids) - len(question) - (start + len(told)) == distance_tokens


def test_prompt_ends_right_before_the_answer() -> None:
    prompt = prompt_at(128)

    assert encode(TOKENIZER.decode(prompt.token_ids) + prompt.answer)[-5:] == prompt.answer_ids
    assert TOKENIZER.decode(prompt.token_ids).endswith(" = ")


def test_same_seed_gives_the_same_prompt() -> None:
    assert prompt_at(256, seed=5) == prompt_at(256, seed=5)
    assert prompt_at(256, seed=5) != prompt_at(256, seed=6)


def test_answer_is_told_once() -> None:
    prompt = prompt_at(512)

    assert TOKENIZER.decode(prompt.token_ids).count(prompt.answer) == 1


def test_too_short_filler_is_refused() -> None:
    with pytest.raises(ValueError, match="filler tokens"):
        retrieval_prompt(encode, FILLER[:100], distance_tokens=512, seed=0)


def test_distance_too_short_for_the_other_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        retrieval_prompt(encode, FILLER, distance_tokens=2, seed=1, num_distractors=40)
