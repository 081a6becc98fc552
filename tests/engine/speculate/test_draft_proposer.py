"""The draft model's proposals against the same model asked from scratch, whatever was rejected, moved or left alone."""

import dataclasses
import random
from typing import Any

import pytest
import torch

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.sampling import laws
from codesign.engine.score import score
from codesign.engine.sequence import Sequence
from codesign.engine.speculate.draft_proposer import DraftProposer
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams
from tests.engine.driving import DEFAULTS, generate

DRAFT_SPEC = tiny_spec(seed=7)
SPEC = dataclasses.replace(tiny_spec(seed=8), draft=DRAFT_SPEC)


def proposer(**config: Any) -> DraftProposer:
    speculate = {"name": "draft_model", "adaptive": False}
    built = build_engine(SPEC, EngineConfig.from_dict({**DEFAULTS, "speculate": speculate, **config}))
    assert built.parts.speculation is not None
    found = built.parts.speculation.proposer
    assert isinstance(found, DraftProposer)
    return found


def plain_draft() -> Engine:
    return build_engine(DRAFT_SPEC, EngineConfig.from_dict({**DEFAULTS, "max_batch_size": 1}))


def sequence(name: str, num_prompt: int, slot: int, **sampling: Any) -> Sequence:
    prompt = tuple(random.Random(name).choices(range(128), k=num_prompt))
    params = SamplingParams(max_tokens=200, **sampling)
    own = Sequence(Request(request_id=name, prompt_token_ids=prompt, sampling=params))
    own.slot = slot
    return own


@pytest.mark.parametrize("max_step_tokens", [4, 16, 2048])
def test_proposals_are_the_drafts_own_continuation_whatever_happened_before(max_step_tokens: int) -> None:
    drafting, reference, rng = proposer(max_step_tokens=max_step_tokens), plain_draft(), random.Random(0)
    running = [sequence(f"s{slot}", rng.randint(1, 30), slot) for slot in range(4)]
    num_right = num_compared = num_started = 0
    for _ in range(90):
        wanted = [(own, rng.randint(1, 5)) for own in running if rng.random() < 0.8]
        drafts = drafting.propose(wanted) if wanted else {}
        for own, count in wanted:
            if own.request_id not in drafts:
                continue  # its text is still coming in
            params = SamplingParams(max_tokens=count, ignore_eos=True)
            text = Request(request_id="x", prompt_token_ids=tuple(own.token_ids), sampling=params)
            assert list(drafts[own.request_id].token_ids) == generate(reference, text)["x"]
            assert drafts[own.request_id].laws is None
            num_compared += 1
        for own in running:  # accepts some drafts, then a token of its own; or goes on without any
            token_ids = drafts[own.request_id].token_ids if own.request_id in drafts else ()
            kept = token_ids[: rng.randint(0, len(token_ids))]
            num_right += len(kept)
            own.token_ids += [*kept, rng.randrange(128)]
        event = rng.random()
        if event < 0.15:  # two sequences come back in each other's slots, as after preemption
            one, other = rng.sample(running, 2)
            one.slot, other.slot = other.slot, one.slot
            running.sort(key=lambda own: own.slot)
        elif event < 0.4:  # one is done, another request has its slot, perhaps under the same name
            index, num_started = rng.randrange(4), num_started + 1
            gone = running[index]
            drafting.release(gone.request_id)
            name = gone.request_id if rng.random() < 0.5 else f"n{num_started}"
            running[index] = sequence(name, rng.randint(1, 30), gone.slot)
        for index, own in enumerate(running):
            if len(own.token_ids) > 200:
                running[index] = sequence(f"{own.request_id}+", 3, own.slot)

    assert num_compared > 20 and num_right > 10


def test_a_long_text_comes_in_bounded_steps_while_others_are_drafted_for() -> None:
    drafting = proposer(max_step_tokens=16)
    short, long = sequence("short", 3, 1), sequence("long", 100, 0)
    seen = []
    for _ in range(10):
        drafts = drafting.propose([(long, 2), (short, 2)])
        seen.append(sorted(drafts))
        short.token_ids.append(5)

    assert all("short" in names for names in seen)
    assert "long" not in seen[5] and "long" in seen[-1]


def test_drawn_drafts_come_with_the_law_they_were_drawn_from() -> None:
    drafting = proposer()
    sampling = {"temperature": 0.7, "top_k": 9, "seed": 5}
    own, greedy = sequence("drawn", 12, 0, **sampling), sequence("greedy", 9, 1)
    drafts = drafting.propose([(own, 4), (greedy, 3)])
    draft = drafts["drawn"]
    text = [*own.token_ids, *draft.token_ids]
    expected: list[torch.Tensor] = []
    score(
        plain_draft(),
        [text],
        num_prefill=len(own.token_ids),
        on_logits=lambda _, __, row: expected.append(laws(row, [own.sampling])[0]),
    )

    assert draft.laws is not None and drafts["greedy"].laws is None
    torch.testing.assert_close(draft.laws, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert all(float(law[token]) > 0 for law, token in zip(draft.laws, draft.token_ids, strict=True))


def test_nothing_is_drafted_behind_a_token_that_ends_the_output() -> None:
    first = proposer().propose([(sequence("a", 12, 0), 5)])["a"].token_ids
    own = sequence("a", 12, 0, stop_token_ids=(first[1],))

    assert proposer().propose([(own, 5)])["a"].token_ids == first[: first.index(first[1]) + 1]
