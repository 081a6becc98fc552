"""Points of a real space: conditional knobs, scales, listing, and the way back from a configuration."""

import random
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from codesign.search.advisor import Advisor
from codesign.search.objective import FAILURE, Told
from codesign.search.suggest import Points, decode, distribution_of, encode
from codesign.spec.domain import Domain, Range, Values
from codesign.spec.metrics import Objective
from codesign.spec.space import load_space
from tests.search.studies import space_of

CONDITIONAL = """
max_batch_size: [16, 1, 4]
weights: {native: {}, int8: {}, int4: {group_size: [32, 64, 128]}}
kv: {policy: {full: {}, h2o: {kv_budget: [0.1, 0.2, 0.4]}, streaming_llm: {kv_budget: [0.1, 0.5]}}}
"""


@pytest.fixture
def points(tmp_path: Path) -> Points:
    return Points(space_of(tmp_path, CONDITIONAL), max_model_len=256)


def test_a_knob_appears_only_with_its_choice(points: Points) -> None:
    rng = random.Random(1)
    for _ in range(60):
        point = points.drawn(rng)
        flat = point.config.flat()

        assert ("weights.int4.group_size" in point.params) == (flat["weights"] == "int4")
        for policy in ("h2o", "streaming_llm"):
            assert (f"kv.policy.{policy}.kv_budget" in point.params) == (flat["kv.policy"] == policy)
        assert set(point.params) == set(point.distributions)


def test_suggestions_of_optuna_respect_the_conditions_too(points: Points) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(30):
        trial = study.ask()
        point = points.suggested(trial)
        seen |= set(point.params)

        assert ("weights.int4.group_size" in trial.params) == (point.config.weights.name == "int4")
        assert trial.params == point.params
    assert seen >= {"weights", "kv.policy", "weights.int4.group_size", "kv.policy.h2o.kv_budget"}


def test_every_point_is_listed_once(points: Points) -> None:
    listed = [point.config.digest for point in points.all()]

    assert len(listed) == len(set(listed)) == points.space.size == 3 * 5 * 6


def test_a_continuous_space_cannot_be_listed(tmp_path: Path) -> None:
    space = space_of(tmp_path, "kv: {policy: {h2o: {kv_budget: {low: 0.1, high: 0.5}}}}\n")

    with pytest.raises(ValueError, match="continuous"):
        list(Points(space).all())


def test_a_configuration_is_located_where_it_was_drawn(points: Points) -> None:
    rng = random.Random(2)
    for _ in range(40):
        point = points.drawn(rng)
        found = points.located(point.config)

        assert (found.params, found.distributions) == (point.params, point.distributions)


def test_a_value_that_the_space_does_not_offer_has_no_place(points: Points) -> None:
    place = points.located(points.space.default(256).resolve())
    offered = points.located(next(points.all()).config)

    assert place.params["weights"] == "native"
    assert "max_batch_size" in offered.params


SPARSE = """
max_batch_size: [8, 64]
weights: {native: {}, int4: {}}
prune: {none: {}, wanda: {pattern: [unstructured, two_of_four]}}
"""


def test_two_of_four_is_proposed_only_where_it_can_pay(tmp_path: Path) -> None:
    points = Points(space_of(tmp_path, SPARSE))

    offered = {
        (point.config.weights.name, point.config.max_batch_size)
        for point in points.all()
        if point.refusal is None and point.config.prune.knob_dict.get("pattern") == "two_of_four"
    }

    assert offered == {("native", 64)}


def test_what_is_ruled_out_is_counted_by_its_reason(tmp_path: Path) -> None:
    looked_at, reasons = Points(space_of(tmp_path, SPARSE)).ruled_out()

    assert looked_at == 12
    assert {reason.partition(":")[0]: count for reason, count in reasons.items()} == {
        "prune.pattern two_of_four with packed weights": 2,
        "prune.pattern two_of_four with max_batch_size below 64": 1,
    }


def test_of_a_large_space_a_sample_is_looked_at(tmp_path: Path) -> None:
    looked_at, reasons = Points(space_of(tmp_path, SPARSE + "max_step_tokens: {low: 256, high: 4096}")).ruled_out()

    assert 100 <= looked_at <= 1000
    assert 0 < sum(reasons.values()) < looked_at / 2


def test_the_shipped_space_of_weights_never_prunes_before_gptq() -> None:
    points = list(Points(load_space(Path(__file__).parents[2] / "search_spaces/weights.yaml")).all())
    both = [p for p in points if p.config.prune.name != "none" and p.config.weights.knob_dict.get("method") == "gptq"]

    assert both and all(point.refusal is not None for point in both)
    assert sum(point.refusal is not None for point in points) == len(both)


def test_a_list_of_numbers_is_an_ordered_scale() -> None:
    domain = Values((16, 1, 4))

    assert distribution_of(domain) == IntDistribution(0, 2)
    assert [encode(domain, value) for value in (1, 4, 16)] == [0, 1, 2]
    assert [decode(domain, place) for place in (0, 1, 2)] == [1, 4, 16]


@pytest.mark.parametrize(
    ("domain", "distribution"),
    [
        (Values(("a", "b")), CategoricalDistribution(("a", "b"))),
        (Values((True, False)), CategoricalDistribution((True, False))),
        (Values((1, 0.5)), CategoricalDistribution((1, 0.5))),
        (Range(low=1, high=64, log=True), IntDistribution(1, 64, log=True)),
        (Range(low=128, high=512, step=128), IntDistribution(128, 512, step=128)),
        (Range(low=0.1, high=0.5), FloatDistribution(0.1, 0.5)),
        (Range(low=0.1, high=0.5, log=True), FloatDistribution(0.1, 0.5, log=True)),
    ],
)
def test_domains_in_optunas_words(domain: Domain, distribution: object) -> None:
    assert distribution_of(domain) == distribution


@pytest.mark.parametrize(
    "domain",
    [
        Range(low=1, high=64, log=True),
        Range(low=128, high=512, step=128),
        Range(low=0.1, high=0.5),
        Range(low=0.25, high=1.0, step=0.25),
        Values((3, 1)),
    ],
)
def test_random_draws_stay_in_their_domain(domain: Domain, tmp_path: Path) -> None:
    from codesign.search.suggest import _draw

    rng = random.Random(5)
    assert all(_draw(domain, rng) in domain for _ in range(200))


def test_the_sampler_learns_to_stay_away_from_infeasible_points(tmp_path: Path) -> None:
    """Told as infeasible, a region that takes half of the space is left; told as failed it would not be."""
    points = Points(space_of(tmp_path, "max_batch_size: {low: 1, high: 64}\nmax_step_tokens: {low: 1, high: 64}\n"))
    objectives = (Objective.of("throughput_tokens_per_s"),)

    def bad_share(tell_infeasible: bool) -> float:
        advisor, bad = Advisor(points, objectives, seed=0), 0
        for number in range(60):
            point = advisor.suggest(number)
            is_bad = point.config.max_batch_size > 32
            bad += is_bad and number >= 20
            value = float(point.config.max_batch_size)  # more is better, up to the cliff
            told = Told(values=(0.0 if is_bad else value,), constraints={FAILURE: float(is_bad)}, is_sentinel=is_bad)
            advisor.learn(point, told if tell_infeasible or not is_bad else None)
        return bad / 40

    assert bad_share(True) < 0.5 * bad_share(False)
