"""Physical sanity: a number beyond the machine's peak is a wrong measurement, not a fast configuration."""

import dataclasses

import pytest

from codesign.measure.sanity import impossible
from codesign.measure.session import BuildFacts
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.hardware import Hardware
from codesign.units import GIB
from tests.measure.test_summary import readings, sample

CONFIG = EngineConfig(dtype="bf16", max_batch_size=1)
FACTS = BuildFacts(resolved={"num_parameters": 8_000_000_000}, bytes={}, kernels={}, phases={})
GPU = Hardware.model_validate(
    {
        "name": "gpu",
        "device": "cuda",
        "memory": [{"name": "hbm", "gib": 80, "gb_per_s": 2000}],
        "peak_tflops": {"bf16": 300},
    }
)
SIZES = {"peak": 20 * GIB, "weights": 16 * 10**9, "kv": 0}


def found(*, tokens_per_s: float, hardware: Hardware = GPU) -> str | None:
    data = readings([[sample(tokens=100)]], wall_s=100 / tokens_per_s, bytes=SIZES)
    return impossible(data, FACTS, hardware, CONFIG)


def test_a_possible_speed_passes() -> None:
    assert found(tokens_per_s=100) is None


def test_more_traffic_than_the_memory_has_is_impossible() -> None:
    """16 GB of weights per token at batch 1: 2000 GB/s allow 125 tokens/s."""
    message = found(tokens_per_s=150)

    assert message is not None
    assert "GB/s" in message


def test_one_step_may_give_as_many_tokens_as_it_verifies_and_one_more() -> None:
    data = readings([[sample(tokens=100)]], wall_s=100 / 400, bytes=SIZES)

    assert (
        impossible(data, FACTS, GPU, dataclasses.replace(CONFIG, speculate=Choice.of("ngram", num_draft_tokens=3)))
        is None
    )
    assert impossible(data, FACTS, GPU, dataclasses.replace(CONFIG, speculate=Choice.of("ngram", num_draft_tokens=1)))


def test_more_arithmetic_than_the_device_has_is_impossible() -> None:
    slow = GPU.model_copy(update={"peak_tflops": GPU.peak_tflops.model_copy(update={"bf16": 1.0})})
    message = found(tokens_per_s=100, hardware=slow)

    assert message is not None
    assert "TFLOP/s" in message


@pytest.mark.parametrize("speed", [1e3, 1e6])
def test_without_published_peaks_nothing_is_claimed(speed: float) -> None:
    assert found(tokens_per_s=speed, hardware=Hardware(name="cpu", device="cpu")) is None
