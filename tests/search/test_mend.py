"""Draws that rules exclude come out allowed, keep what they can, and leave nothing out of reach."""

import dataclasses
import random
from pathlib import Path

import pytest

from codesign.search.mend import mended
from codesign.search.preflight import study_rules
from codesign.search.suggest import Points
from codesign.spec.profile import load_profile
from codesign.spec.space import load_space
from tests.search.studies import space_of

ROOT = Path(__file__).parents[2]


def shipped(space: str, profile: str, *, count: int = 1) -> Points:
    """A shipped space under a shipped profile whose machine has so many devices or cores."""
    own = load_profile(ROOT / "profiles" / profile)
    key = "cores" if own.device == "cpu" else "count"
    own = dataclasses.replace(own, hardware=own.hardware.model_copy(update={key: count}))
    return Points(load_space(ROOT / "search_spaces" / space), own.workload.max_model_len, study_rules(own))


@pytest.mark.parametrize("space", ["throughput.yaml", "latency.yaml"])
@pytest.mark.parametrize(("profile", "count"), [("cpu.yaml", 2), ("a100.yaml", 1), ("a100.yaml", 8)])
def test_every_draw_of_the_preset_spaces_can_be_mended(space: str, profile: str, count: int) -> None:
    points, rng = shipped(space, profile, count=count), random.Random(0)
    found = [mended(points, points.drawn(rng), rng) for _ in range(40)]

    assert [point.refusal for point in found if point.refusal is not None] == []
    assert len({point.config.digest for point in found}) > 30


def test_every_line_of_the_throughput_preset_is_a_knob_that_draws_reach_where_the_machine_has_room() -> None:
    """The survey's section 6: batch, continuous batching, chunks, both degrees of parallelism, int4 by awq."""
    points, rng = shipped("throughput.yaml", "a100.yaml", count=32), random.Random(1)
    seen = {item for _ in range(150) for item in mended(points, points.drawn(rng), rng).config.flat().items()}

    assert seen >= {
        ("max_batch_size", 32),
        ("scheduler", "continuous"),
        ("scheduler.continuous.prefill_chunk_tokens", 512),
        ("parallel.tensor_parallel_size", 8),
        ("parallel.pipeline_parallel_size", 4),
        ("weights.int4.method", "awq"),
    }


def test_an_allowed_draw_stays_as_it_is() -> None:
    points, rng = shipped("throughput.yaml", "cpu.yaml", count=2), random.Random(2)
    allowed = next(point for point in iter(lambda: points.drawn(rng), None) if point.refusal is None)

    assert mended(points, allowed, rng) is allowed


PAIRS = """
max_batch_size: [1, 2, 4]
prefix_cache: [false, true]
kv: {layout: {dense: {}, paged: {}}}
weights: {native: {}, int4: {group_size: [32, 64]}}
"""


def test_what_rules_do_not_touch_is_kept_and_mostly_the_earlier_knob_decides(tmp_path: Path) -> None:
    points, rng = Points(space_of(tmp_path, PAIRS), max_model_len=64), random.Random(3)
    refused = [point for point in points.all() if point.refusal is not None]
    layouts = []
    for drawn in refused:
        found = mended(points, drawn, rng)
        layouts.append(found.params["kv.layout"])

        free = drawn.params.keys() - {"prefix_cache", "kv.layout"}
        assert {name: found.params[name] for name in free} == {name: drawn.params[name] for name in free}
        assert found.refusal is None and found.distributions.keys() == found.params.keys() == drawn.params.keys()
    assert len(refused) == 3 * 3 and layouts.count("paged") >= 6


def test_a_space_whose_unmodified_configuration_is_ruled_out_is_searched_too(tmp_path: Path) -> None:
    text = PAIRS + "constraints: [{when: {weights: native}, reason: not here}]\n"
    points, rng = Points(space_of(tmp_path, text), max_model_len=64), random.Random(4)

    assert all(mended(points, point, rng).refusal is None for point in points.all())


def test_where_nothing_is_allowed_a_draw_stays_refused(tmp_path: Path) -> None:
    text = PAIRS + "constraints: [{when: {max_batch_size: {min: 1}}, reason: never}]\n"
    points, rng = Points(space_of(tmp_path, text), max_model_len=64), random.Random(5)
    drawn = points.drawn(rng)

    assert mended(points, drawn, rng) is drawn and drawn.refusal == "never"
