"""Physical sanity: no trial may report more arithmetic or more traffic than its machine has.

Lower bounds of what the measured tokens must have cost are compared with the profile's peaks; a breach means that the
measurement is wrong, so the trial is no result. Peaks that the profile does not give are not checked.
"""

from codesign.measure.session import BuildFacts
from codesign.measure.summary import Readings
from codesign.spec.engine_config import EngineConfig
from codesign.spec.hardware import Hardware
from codesign.units import MIB

# Published peaks of a GPU are rounded and boost clocks exceed them a little. Those of a CPU come from `codesign probe`,
# which may have had to share it.
_TOLERANCE = {"cuda": 1.1, "cpu": 3.0}
# Weights that fit a last-level cache are not read from memory each step.
_CACHE_BYTES = 512 * MIB


def impossible(readings: Readings, facts: BuildFacts, hardware: Hardware, config: EngineConfig) -> str | None:
    """What cannot be, or None.

    Arithmetic: 2 operations per parameter and token, prompt and output, against the highest peak of any number format,
    because a kernel may compute in another format than it is given. Traffic: the weights once per step, with at least
    output tokens / (batch x most tokens that a step gives a sequence) steps.
    """
    tolerance = _TOLERANCE[hardware.device]
    tokens = sum(sample.prompt_tokens + sample.output_tokens for sample in readings.samples)
    parameters = facts.resolved.get("num_parameters")
    peak = max((value for value in hardware.peak_tflops.model_dump().values() if value is not None), default=None)
    if isinstance(parameters, int) and peak is not None:
        used = 2 * parameters * tokens / readings.wall_s / 1e12
        if used > peak * hardware.count * tolerance:
            return f"{used:.3g} TFLOP/s, more than the {peak:g} of the profile (MFU {used / peak:.2f})"
    bandwidth = hardware.memory[0].gb_per_s if hardware.memory else None
    weights = readings.bytes["weights"]
    if bandwidth is not None and weights > _CACHE_BYTES:
        batch = min(config.max_batch_size, len(readings.samples))
        drafts = config.speculate.knob_dict.get("num_draft_tokens", 0)
        per_step = batch * (1 + drafts if isinstance(drafts, int) else 1)
        used = weights * readings.output_tokens / per_step / readings.wall_s / 1e9
        if used > bandwidth * hardware.count * tolerance:
            return f"{used:.3g} GB/s, more than the {bandwidth:g} of the profile (MBU {used / bandwidth:.2f})"
    return None
