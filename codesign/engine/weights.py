"""build_decoder: the weights of one EngineConfig, from a checkpoint or random numbers: pruned, packed, kept."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from codesign.engine.caches import cache_folder
from codesign.engine.memory import reset_peak_memory, return_freed_memory
from codesign.engine.models.assemble import Assembler, PackClock, TensorSource
from codesign.engine.models.decoder import Decoder
from codesign.engine.models.imported import ImportedCheckpoint, read_layout
from codesign.engine.models.load import Checkpoint, read_config
from codesign.engine.models.random import RandomWeights
from codesign.engine.models.rope_scaling import rope_of
from codesign.engine.models.shape import ModelShape
from codesign.engine.parallel.links import Links
from codesign.engine.parallel.part import Part
from codesign.engine.parallel.sharded import Sharded
from codesign.engine.parallel.stage import build_stage
from codesign.engine.parallel.whole_rows import WholeRows, has_row_scales
from codesign.engine.prune.pruner import Pruner
from codesign.engine.prune.pruners.none import NoPruning
from codesign.engine.quantize.cache import WeightCache
from codesign.engine.quantize.cache_key import weights_key
from codesign.engine.quantize.calibration import Calibration
from codesign.engine.quantize.calibration_text import calibration_ids
from codesign.engine.quantize.format import GridFormat, WeightFormat
from codesign.engine.quantize.formats.mixed import Mixed
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.linear import Workspace
from codesign.engine.quantize.packed_linear import PackedFormat
from codesign.engine.quantize.plan import Plan, planned
from codesign.engine.quantize.sensitivity import NUM_SEQUENCES, NUM_TOKENS
from codesign.errors import Unsupported
from codesign.registry import PRUNERS, WEIGHT_FORMATS
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec


def build_decoder(
    model: ModelSpec,
    shape: ModelShape,
    config: EngineConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    workspace: Workspace,
    clock: PackClock,
    part: Part | None = None,
    links: Links | None = None,
) -> Decoder:
    """Args:
        clock: takes the seconds spent on packing and what the cache did.
        part: what to build of the model, a Stage; by default all of it.
        links: to the ranks that hold the rest.
    Raises:
        InputError: a file or tensor of the model is wrong.
        Unsupported: a format that this device cannot multiply or that cannot hold a weight, or a method that cannot
            see text.
    """
    weight_format: WeightFormat = WEIGHT_FORMATS.create(config.weights.name, key="weights", **config.weights.knob_dict)
    try:
        weight_format.check_device(device, dtype)
    except ValueError as error:
        raise Unsupported(f"weights {config.weights.name}: {error}") from error
    pruner: Pruner = PRUNERS.create(config.prune.name, key="prune", **config.prune.knob_dict)
    source = _source(model, shape, config, dtype)
    files = source.files if isinstance(source, Checkpoint) else []
    if part is not None:
        if isinstance(source, ImportedCheckpoint):
            raise Unsupported(
                f"parallel: {source.path} is already quantised, and its packed weights are not cut here; use the "
                "original checkpoint, or parallel sizes of 1"
            )
        has_rows = part.tensor_size > 1 and has_row_scales(weight_format, dtype)
        source = Sharded(source, part, whole_rows=has_rows)

    def text(num_sequences: int | None = None, num_tokens: int | None = None) -> Callable[[Tensor], Calibration]:
        def calibrate(embedding: Tensor) -> Calibration:
            ids = calibration_ids(model, shape.vocab_size, shape.max_positions)[:num_sequences, :num_tokens]
            return Calibration(shape, ids, embedding, rope_of(shape.rope, shape.head_dim))

        return calibrate

    assembler = Assembler(
        shape=shape if part is None else part.shape,
        weight_format=weight_format,
        pruner=pruner,
        dtype=dtype,
        device=device,
        workspace=workspace,
        calibrate=text(),
        clock=clock,
    )
    if isinstance(weight_format, Mixed):
        weight_format = _plan(weight_format, assembler, source, text(NUM_SEQUENCES, NUM_TOKENS), model, files)
        assembler = dataclasses.replace(assembler, weight_format=weight_format)
    if weight_format.method_member is not None:
        if isinstance(weight_format, PackedFormat):  # a shadow is made anew at each build: what is kept is packed
            weight_format = dataclasses.replace(weight_format, shadow=False)
        assembler = dataclasses.replace(
            assembler,
            cache=WeightCache(cache_folder("weights")),
            cache_key="-".join(
                [
                    weights_key(model, files, weight_format, pruner, dtype=dtype, device=device),
                    *([] if part is None else [part.name]),
                ]
            ),
        )
    if part is None:
        decoder = assembler.build(source)
    else:
        if has_rows:
            assert isinstance(weight_format, GridFormat)
            assembler = dataclasses.replace(assembler, weight_format=WholeRows(weight_format, part))
        decoder = build_stage(assembler, source, part, links)
    if clock.cache == "made":
        # From here on it is as if the weights had been found: what packing them took is not the configuration's.
        workspace.release()
        return_freed_memory()
        reset_peak_memory()
    return decoder


def _source(model: ModelSpec, shape: ModelShape, config: EngineConfig, dtype: torch.dtype) -> TensorSource:
    if model.path is None:
        return RandomWeights(shape, seed=model.seed, dtype=dtype)
    path = Path(model.path)
    layout = read_layout(read_config(path), file=path / "config.json")
    if layout is None:
        return Checkpoint(path, dtype=dtype)
    if config.weights.name != "native" or config.prune.name != "none":
        raise Unsupported(
            f"{path}: the checkpoint is already quantised (quantization_config) and can only be run as it is, with "
            "`weights: native` and `prune: none`; other formats need the original weights"
        )
    return ImportedCheckpoint(path, dtype=dtype, layout=layout)


def _plan(
    mixed: Mixed,
    assembler: Assembler,
    source: TensorSource,
    calibrate: Callable[[Tensor], Calibration],
    model: ModelSpec,
    files: list[Path],
) -> Plan:
    """A format for every linear, from what rounding it costs."""
    started = time.perf_counter()
    dense = dataclasses.replace(assembler, weight_format=Native(), pruner=NoPruning(), clock=PackClock())
    # What sensitivities depend on: neither the budgets nor the method that will choose the codes.
    asked = Mixed(group_size=mixed.group_size)
    key = weights_key(
        model, files, asked, NoPruning(), dtype=assembler.dtype, device=assembler.device, is_calibrated=True
    )
    try:
        return planned(mixed, dense, source, calibrate, key)
    except ValueError as error:
        raise Unsupported(f"weights mixed: {error}") from error
    finally:
        assembler.clock.quantize_s += time.perf_counter() - started
