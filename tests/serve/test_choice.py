"""A choice ends where the engine or a stop string says, and says what its tokens scored."""

from codesign.bundled import target_path
from codesign.engine.models.tokenizer import Tokenizer
from codesign.engine.sequence import StepOutput
from codesign.serve.choice import Choice, Piece

TOKENIZER = Tokenizer(target_path())


def outputs(text: str, finish_reason: str = "", *, end: int | None = None) -> list[StepOutput]:
    token_ids = TOKENIZER.encode(text) + ([] if end is None else [end])
    reasons = [""] * (len(token_ids) - 1) + [finish_reason]
    return [StepOutput("r", token, reason) for token, reason in zip(token_ids, reasons, strict=True)]


def taken(choice: Choice, given: list[StepOutput]) -> list[Piece]:
    return [choice.take(output) for output in given]


def test_an_end_of_text_counts_as_a_token_and_is_no_text() -> None:
    choice = Choice(TOKENIZER, (), ())
    pieces = taken(choice, outputs("import os", "stop", end=0))

    assert "".join(piece.text for piece in pieces) == "import os"
    assert choice.finish_reason == pieces[-1].finish_reason == "stop"
    assert choice.num_tokens == len(pieces)


def test_what_was_held_back_comes_with_the_end() -> None:
    choice = Choice(TOKENIZER, (), ("os.path",))
    pieces = taken(choice, outputs("import os.", "length"))

    assert "".join(piece.text for piece in pieces) == "import os."
    assert choice.finish_reason == "length"


def test_a_stop_string_that_the_last_token_completes_is_a_stop() -> None:
    choice = Choice(TOKENIZER, (), ("os",))
    pieces = taken(choice, outputs("import os", "length"))

    assert "".join(piece.text for piece in pieces) == "import "
    assert choice.finish_reason == "stop"


def test_an_output_cut_within_a_character_shows_that_it_was() -> None:
    token_ids = TOKENIZER.encode("\U0001f600")
    choice = Choice(TOKENIZER, (), ())
    pieces = taken(choice, [StepOutput("r", token_ids[0]), StepOutput("r", token_ids[1], "length")])

    assert [piece.text for piece in pieces] == ["", "\ufffd"]


def test_scores_are_texts_with_offsets() -> None:
    first, second = TOKENIZER.encode("import os")[:2]
    choice = Choice(TOKENIZER, (), ())
    choice.take(StepOutput("r", first, "", ((first, -0.5), (first, -0.5), (second, -1.5))))
    score = choice.take(StepOutput("r", second, "length", ((second, -2.0),))).score

    assert score is not None
    assert (score.text, score.logprob, score.offset, score.likeliest) == (TOKENIZER.decode([second]), -2.0, 6, ())
