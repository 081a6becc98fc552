from typing import Any

import pytest

from codesign.engine.sequence import Sequence
from codesign.engine.speculate.proposers.ngram import NgramProposer
from codesign.errors import InputError
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams


def sequence(name: str, *tokens: int) -> Sequence:
    return Sequence(Request(request_id=name, prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=50)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"min_ngram": 3, "max_ngram": 2}, "min_ngram 3 is more than max_ngram 2"),
        ({"min_ngram": 0}, "min_ngram must be a whole number from 1 to 16"),
        ({"max_ngram": 17}, "max_ngram must be a whole number from 1 to 16"),
        ({"num_draft_tokens": 65}, "num_draft_tokens must be a whole number from 1 to 64"),
    ],
)
def test_wrong_knobs_are_named(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EngineConfig.from_dict({"speculate": {"name": "ngram", **knobs}}).resolve()


def test_texts_do_not_mix_and_a_name_may_come_again() -> None:
    proposer = NgramProposer(1, 2)
    one, other = sequence("a", 1, 2, 3, 1), sequence("b", 1, 9, 9, 1)
    drafts = proposer.propose([(one, 2), (other, 2)])
    assert drafts["a"].token_ids == (2, 3) and drafts["b"].token_ids == (9, 9)

    again = sequence("a", 1, 5, 1)
    assert proposer.propose([(again, 1)])["a"].token_ids == (5,)


def test_nothing_is_kept_of_a_request_that_is_done() -> None:
    proposer = NgramProposer(1, 2)
    proposer.propose([(sequence("a", 1, 2, 1), 2)])
    proposer.release("a")
    proposer.release("never seen")

    assert not proposer._indices


def test_a_text_without_repetition_gets_no_draft() -> None:
    assert NgramProposer(2, 4).propose([(sequence("a", 1, 2, 3, 4), 4)]) == {}
