import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.errors import InputError
from codesign.spec.domain import Domain, Range, Values
from codesign.spec.engine_config import FAMILIES, PLAIN_FIELDS, Choice, EngineConfig, KernelsConfig, KVConfig, Scalar
from codesign.spec.space import SearchSpace, load_space

SHIPPED = load_space(Path(__file__).parents[2] / "search_spaces/default.yaml")
SHIPPED_GPU = load_space(Path(__file__).parents[2] / "search_spaces/gpu.yaml")

TEXT = """
dtype: [bf16, fp32]
max_batch_size: [1, 2, 4]
max_step_tokens: {low: 128, high: 512, step: 128}
weights: {native: {}, int8: , int4: {group_size: [32, 64]}}
kv:
  policy: {full: {}, h2o: {kv_budget: [0.1, 64], num_sink_tokens: 4}}
constraints:
- when: {weights: int4, dtype: {not: bf16}}
  reason: int4 wants bf16
- when: {weights.int4.group_size: [32], max_batch_size: {min: 2, max: 3}}
  reason: an odd one
- when: {kv.policy.h2o.recent_fraction: {max: 0.5}, max_batch_size: 4}
  reason: a default counts too
"""


def space(tmp_path: Path, text: str = TEXT) -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return load_space(path)


def pick_from(choices: dict[str, Scalar]) -> Any:
    """Takes what is named, else the first value."""

    def pick(name: str, domain: Domain) -> Scalar:
        chosen = choices.get(name, domain.examples[0])
        assert chosen in domain
        return chosen

    return pick


def every_point(found: SearchSpace) -> set[EngineConfig]:
    """All configurations, by walking every answer that `build` can be given."""
    configs: set[EngineConfig] = set()
    open_answers: list[list[Scalar]] = [[]]
    while open_answers:
        answers = open_answers.pop()
        asked: list[Domain] = []

        def pick(name: str, domain: Domain, answers: list[Scalar] = answers, asked: list[Domain] = asked) -> Scalar:
            asked.append(domain)
            return answers[len(asked) - 1] if len(asked) <= len(answers) else values_of(domain)[0]

        config = found.build(pick)
        if len(asked) <= len(answers):
            configs.add(config)
        else:
            open_answers += [[*answers, value] for value in values_of(asked[len(answers)])]
    return configs


def values_of(domain: Domain) -> list[Scalar]:
    if isinstance(domain, Values):
        return list(domain.values)
    assert domain.size is not None
    return [domain.low + index * (domain.step or 1) for index in range(domain.size)]


def test_size_counts_the_distinct_points(tmp_path: Path) -> None:
    found = space(tmp_path)

    assert found.size == len(every_point(found)) == 2 * 3 * 4 * (1 + 1 + 2) * (1 + 2)


def test_a_continuous_range_has_no_size(tmp_path: Path) -> None:
    assert space(tmp_path, "kv: {policy: {h2o: {kv_budget: {low: 0.1, high: 0.5}}}}").size is None


def test_knobs_are_asked_only_where_their_member_is_chosen(tmp_path: Path) -> None:
    asked: list[str] = []

    def pick(name: str, domain: Domain) -> Scalar:
        asked.append(name)
        return {"weights": "int4", "kv.policy": "full"}.get(name, domain.examples[0])

    space(tmp_path).build(pick)

    assert asked == ["dtype", "max_batch_size", "max_step_tokens", "weights", "weights.int4.group_size", "kv.policy"]


def test_what_is_fixed_is_not_asked(tmp_path: Path) -> None:
    def never(name: str, domain: Domain) -> Scalar:
        raise AssertionError(name)

    config = space(tmp_path, "dtype: fp32\nweights: {int4: {group_size: [32]}}\nmax_batch_size: [3]").build(never)

    assert (config.dtype, config.max_batch_size, config.weights) == ("fp32", 3, Choice.of("int4", group_size=32))


def test_build_puts_every_choice_where_it_belongs(tmp_path: Path) -> None:
    pick = pick_from({"dtype": "fp32", "weights": "int4", "weights.int4.group_size": 64, "kv.policy": "h2o",
                      "kv.policy.h2o.kv_budget": 64})  # fmt: skip

    assert space(tmp_path).build(pick, max_model_len=700) == EngineConfig(
        dtype="fp32",
        max_batch_size=1,
        max_model_len=700,
        max_step_tokens=128,
        weights=Choice.of("int4", group_size=64),
        kv=KVConfig(policy=Choice.of("h2o", kv_budget=64, num_sink_tokens=4)),
    )


@given(st.sampled_from([SHIPPED, SHIPPED_GPU]), st.randoms(use_true_random=False))
def test_every_point_builds_resolves_and_reads_back(found: SearchSpace, rng: random.Random) -> None:
    config = found.build(lambda name, domain: rng.choice(values_of(domain)), max_model_len=544).resolve()

    assert EngineConfig.from_dict(config.to_dict()) == config


@given(st.sampled_from([SHIPPED, SHIPPED_GPU]), st.randoms(use_true_random=False))
def test_parameters_are_the_names_that_are_asked_and_that_flat_knows(found: SearchSpace, rng: random.Random) -> None:
    by_name = {parameter.name: parameter for parameter in found.parameters()}
    asked: dict[str, Scalar] = {}

    def pick(name: str, domain: Domain) -> Scalar:
        assert by_name[name].domain == domain
        when = by_name[name].when
        assert when is None or asked[when[0]] == when[1]
        asked[name] = rng.choice(values_of(domain))
        return asked[name]

    config = found.build(pick)

    assert asked.items() <= config.flat().items()


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({}, None),
        ({"weights": "int4", "dtype": "bf16"}, None),
        ({"weights": "int4", "dtype": "fp32"}, "int4 wants bf16"),
        ({"weights": "int4", "max_batch_size": 2}, "an odd one"),
        ({"weights": "int4", "max_batch_size": 4}, None),
        ({"weights": "int4", "max_batch_size": 2, "weights.int4.group_size": 64}, None),
        ({"max_batch_size": 2}, None),
        ({"kv.policy": "h2o", "max_batch_size": 4}, "a default counts too"),
        ({"kv.policy": "full", "max_batch_size": 4}, None),
    ],
)
def test_a_constraint_refuses_exactly_what_it_names(
    choices: dict[str, Scalar], reason: str | None, tmp_path: Path
) -> None:
    found = space(tmp_path)

    assert found.refusal(found.build(pick_from(choices))) == reason


def test_the_default_is_the_unmodified_configuration(tmp_path: Path) -> None:
    found = space(tmp_path, "weights: [int8]\nkv: {policy: {h2o: {kv_budget: 0.1}}}\nmax_batch_size: [4, 8]")

    assert found.default(300) == EngineConfig(max_model_len=300, max_batch_size=8)


def test_a_default_that_the_space_does_not_hold_moves_into_it(tmp_path: Path) -> None:
    found = space(tmp_path, "dtype: [fp32]\nmax_batch_size: [2, 4]\nmax_step_tokens: {low: 128, high: 512, step: 128}")
    default = found.default(300)

    assert (default.dtype, default.max_batch_size, default.max_step_tokens) == ("fp32", 2, 512)


def test_the_space_may_fix_the_longest_sequence(tmp_path: Path) -> None:
    found = space(tmp_path, "max_model_len: 1024")

    assert found.build(pick_from({}), max_model_len=300).max_model_len == 1024
    assert found.default(300).max_model_len == 1024


def test_a_flag_can_be_free_and_the_default_leaves_it_off(tmp_path: Path) -> None:
    found = space(tmp_path, "kernels: {fused: [true, false]}\nmax_batch_size: [1, 8]")

    assert found.size == 4
    assert {config.kernels.fused for config in every_point(found)} == {True, False}
    assert found.default(300) == EngineConfig(max_model_len=300)


def test_a_flag_that_is_fixed_is_fixed_in_the_default_too(tmp_path: Path) -> None:
    found = space(tmp_path, "kernels: {fused: true}")

    assert found.default(300).kernels == found.build(pick_from({})).kernels == KernelsConfig(fused=True)


def test_degrees_are_knobs_and_the_default_is_one_rank(tmp_path: Path) -> None:
    found = space(tmp_path, "parallel: {tensor_parallel_size: [1, 2], pipeline_parallel_size: [1, 2]}")

    ranks = sorted(config.parallel.num_ranks for config in every_point(found))

    assert ranks == [1, 2, 2, 4]
    assert found.default(300) == EngineConfig(max_model_len=300)


@pytest.mark.parametrize(("condition", "refused"), [("true", True), ("[false]", False), ("{not: false}", True)])
def test_a_constraint_can_name_a_flag(condition: str, refused: bool, tmp_path: Path) -> None:
    text = f"kernels: {{fused: [true, false]}}\nconstraints:\n- when: {{kernels.fused: {condition}}}\n  reason: so"
    found = space(tmp_path, text)

    assert (found.refusal(found.build(pick_from({"kernels.fused": True}))) == "so") is refused


def test_an_empty_space_is_the_default(tmp_path: Path) -> None:
    found = space(tmp_path, "{}")

    assert found.build(pick_from({})) == EngineConfig()
    assert found.size == 1


def test_the_digest_follows_the_content_and_not_the_layout(tmp_path: Path) -> None:
    one = space(tmp_path, "dtype: [bf16, fp32]\nweights: [native]").digest
    assert one == space(tmp_path, "# a comment\nweights:\n- native\ndtype:\n- bf16\n- fp32\n").digest
    assert one != space(tmp_path, "dtype: [bf16]\nweights: [native]").digest


def test_parameter_names_are_fields_families_and_knobs() -> None:
    names = {parameter.name for parameter in SHIPPED.parameters()}

    assert names & set(PLAIN_FIELDS) and names & set(FAMILIES)
    assert "kv.policy.h2o.kv_budget" in names


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (Values((1, "a", True)), [1, "a", True], [1.0, 2, "b", False, None]),
        (Range(low=1, high=5), [1, 3, 5], [0, 6, 2.5, True, "3"]),
        (Range(low=0, high=10, step=5), [0, 5, 10], [1, 15]),
        (Range(low=0.1, high=0.5), [0.1, 0.3333, 0.5], [0.0999, 0.6, "a"]),
        (Range(low=0.1, high=0.5, step=0.1), [0.1, 0.30000000000000004, 0.5], [0.15]),
    ],
)
def test_a_domain_knows_what_it_holds(domain: Domain, inside: list[Scalar], outside: list[Scalar]) -> None:
    assert all(value in domain for value in inside)
    assert not any(value in domain for value in outside)


def test_a_member_without_its_needed_knob_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recent_fraction must be between 0 and 1"):
        space(tmp_path, "kv: {policy: {h2o: {recent_fraction: [0.5, 1.0]}}}")
