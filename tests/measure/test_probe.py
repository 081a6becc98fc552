"""The probe of this machine: what it prints is the `hardware:` section of a profile."""

from pathlib import Path

from codesign.measure.probe import probe
from codesign.spec.profile import load_profile
from codesign.spec.yaml import dump_yaml

REST = {
    "model": "bundled",
    "workload": {"scenario": "offline", "prompt_tokens": 8, "output_tokens": 8, "num_requests": 1},
    "objectives": ["ttft_ms"],
}


def test_what_the_probe_prints_can_stand_in_a_profile(tmp_path: Path) -> None:
    said: list[str] = []
    found = probe(said.append)
    (tmp_path / "here.yaml").write_text(dump_yaml({"hardware": found, **REST}))
    hardware = load_profile(tmp_path / "here.yaml").hardware

    assert said
    assert hardware.peak_tflops.fp32 is not None
    assert 0.0005 < hardware.peak_tflops.fp32 < 10_000
    assert hardware.memory[0].gb_per_s is not None
    assert 0.5 < hardware.memory[0].gb_per_s < 50_000
