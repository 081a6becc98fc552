"""Plan: a format for every linear layer of a model; what `mixed` becomes once the layers' sensitivities are known."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable

import torch
from torch import Tensor

from codesign.engine.caches import cache_folder
from codesign.engine.models.assemble import Assembler, TensorSource
from codesign.engine.quantize.allocate import Option, allocate
from codesign.engine.quantize.calibration import Calibration
from codesign.engine.quantize.format import GridFormat, WeightFormat
from codesign.engine.quantize.formats.mixed import Mixed
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.quantize.method import Method
from codesign.engine.quantize.sensitivity import Sensitivity, measure


@dataclasses.dataclass(frozen=True)
class Plan(WeightFormat):
    """Args:
    mixed: what was asked for.
    names: (layer, linear, format) of every linear.
    """

    mixed: Mixed
    names: tuple[tuple[int, str, str], ...]

    def of(self, layer: int, name: str) -> GridFormat:
        found = next(own for index, linear, own in self.names if (index, linear) == (layer, name))
        return self.mixed.candidates[found]

    @property
    def method_member(self) -> Method:
        return self.mixed.method_member

    def pack(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        workspace: Workspace,
        inputs: InputStats | None = None,
        num_unclipped_rows: int = 0,
    ) -> Linear:
        raise TypeError("a plan packs nothing itself: ask for the format `of` a linear")


def planned(
    mixed: Mixed, assembler: Assembler, source: TensorSource, calibrate: Callable[[Tensor], Calibration], key: str
) -> Plan:
    """The plan for a model, with sensitivities from an earlier build where there was one.

    Args:
        assembler: builds the model with dense weights.
        calibrate: embedding -> a few texts.
        key: names everything that sensitivities depend on.
    Raises:
        ValueError: no plan keeps the budget.
    """
    file = cache_folder("sensitivity") / f"{key}.json"
    found: Sensitivity | None = None
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # ValueError: not JSON
        found = Sensitivity.from_json(json.loads(file.read_text()))
    if found is not None:
        return make_plan(mixed, found)
    decoder = assembler.build(source)
    found = measure(decoder, calibrate(decoder.embedding), mixed.candidates, dtype=assembler.dtype)
    with contextlib.suppress(OSError):  # the cache is a convenience
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found.to_json()))
        part.replace(file)
    return make_plan(mixed, found)


def make_plan(mixed: Mixed, sensitivity: Sensitivity) -> Plan:
    """Spends bits where they save most, or takes the fewest bytes within a KL.

    Raises:
        ValueError: even the smallest formats exceed the bits, or even the largest lose more than the KL.
    """
    options = {
        linear: [Option(name, num_bytes, loss) for name, (num_bytes, loss) in own.items()]
        for linear, own in sensitivity.losses.items()
    }
    max_bytes = None if mixed.bits is None else int(mixed.bits * sensitivity.num_weights / 8)
    chosen = allocate(options, max_bytes=max_bytes, max_loss=mixed.max_kl)
    names = tuple((layer, linear, chosen[layer, linear].name) for layer, linear in sensitivity.losses)
    return Plan(mixed, names)
