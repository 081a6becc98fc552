import pytest
import torch

from codesign.bundled import draft_path
from codesign.bundled.acceptance import Chains, chains
from codesign.bundled.model import greedy_continuations, load_pretrained
from codesign.bundled.rate import wilson


@pytest.mark.parametrize(
    ("agrees", "expected"),
    [
        ("yyyy", Chains(num_accepted=4, num_proposed=4, num_target_steps=1)),
        ("nnnn", Chains(num_accepted=0, num_proposed=4, num_target_steps=4)),
        ("yyny", Chains(num_accepted=3, num_proposed=4, num_target_steps=2)),
        ("yyyyyn", Chains(num_accepted=4, num_proposed=5, num_target_steps=2)),
    ],
)
def test_tokens_after_a_rejection_do_not_count_as_proposed(agrees: str, expected: Chains) -> None:
    assert chains([letter == "y" for letter in agrees], 4) == expected


def test_wilson_interval_holds_the_rate_and_stays_a_probability() -> None:
    rate = wilson(100, 100)

    assert rate.low < rate.rate == rate.high == 1.0
    assert rate.low == pytest.approx(0.963, abs=1e-3)


@torch.inference_mode()
def test_decoding_token_by_token_agrees_with_scoring_at_once() -> None:
    model = load_pretrained(draft_path())
    ids = greedy_continuations(model, torch.arange(40, 56)[None], 8)

    assert model(ids[:, :-1]).argmax(-1)[0, -8:].tolist() == ids[0, -8:].tolist()
