"""export_checkpoint: the packed weights of a configuration as a Hugging Face directory in compressed-tensors' layout.

What was measured is what is written: codes, scales and folded norms are taken from the built layers, nothing is rounded
again. Engines that read compressed-tensors (vLLM, SGLang, transformers with that library) load it.

    int8, int4, int3, int2, mixed: format pack-quantized      w8a8: int-quantized      native: plain tensors
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from codesign.engine.models.assemble import LINEAR_PARTS, NORM_NAMES, PackClock, layer_shapes
from codesign.engine.models.load import read_config
from codesign.engine.models.shape import ModelShape, read_shape
from codesign.engine.quantize.calibration import LINEARS
from codesign.engine.quantize.grid import divisor
from codesign.engine.quantize.layout import pack_stream
from codesign.engine.quantize.linear import Linear, Stored, Workspace
from codesign.engine.weights import build_decoder
from codesign.errors import Unsupported
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec

_COPIED = ("tokenizer*.json", "special_tokens_map.json", "generation_config.json", "vocab.json", "merges.txt")
_FORMATS = ("native", "int8", "int4", "int3", "int2", "mixed", "w8a8")
_MAX_OFF_GRID = 0.1
"""Of a step: how far a stored offset may lie from a whole number of steps, which 16-bit rounding explains."""

Tensors = dict[str, Tensor]


def export_checkpoint(model: ModelSpec, config: EngineConfig, folder: Path, *, dtype: torch.dtype) -> list[Path]:
    """Writes the directory and returns its files.

    Args:
        dtype: of the configuration.
    Raises:
        Unsupported: random weights, or a format or method that the layout cannot hold.
        OSError: it cannot be written.
    """
    if config.weights.name not in _FORMATS:
        raise Unsupported(
            f"weights {config.weights.name!r} have no layout in compressed-tensors here; choose {', '.join(_FORMATS)}"
        )
    if model.path is None:
        raise Unsupported("random weights are for measuring speed; there is nothing to export")
    source, config = Path(model.path), config.resolve()
    plain = read_config(source)
    if "quantization_config" in plain:
        raise Unsupported(f"{source}: the checkpoint is quantised already; deploy it as it is")
    shape = read_shape(plain, file=source / "config.json")
    cpu, workspace = torch.device("cpu"), Workspace()
    decoder = build_decoder(model, shape, config, dtype=dtype, device=cpu, workspace=workspace, clock=PackClock())
    tensors: Tensors = {"model.embed_tokens.weight": decoder.embedding, "model.norm.weight": decoder.norm.weight}
    if not shape.ties_embeddings:
        tensors["lm_head.weight"] = decoder.head.dequantize().to(dtype)
    groups: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(decoder.layer_list):
        prefix = f"model.layers.{index}."
        for name, own in NORM_NAMES.items():
            norm = getattr(layer, name)
            if norm is not None:
                tensors[f"{prefix}{own}.weight"] = norm.weight
        for name in LINEARS:
            linear: Linear = getattr(layer, name)
            written = _linear(config.weights.name, linear, _rows(shape, index, name), prefix, name, dtype)
            tensors.update(written)
            scheme = _scheme(config.weights.name, linear)
            if scheme is not None:
                group = groups.setdefault(json.dumps(scheme), {**scheme, "targets": []})
                group["targets"] += [f"{prefix}{part}" for part in LINEAR_PARTS[name]]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    plain["torch_dtype"] = str(dtype).removeprefix("torch.")
    if groups:
        plain["quantization_config"] = _quantization_config(config.weights.name, list(groups.values()))
    (folder / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
    for pattern in _COPIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    return sorted(folder.iterdir())


def _rows(shape: ModelShape, index: int, name: str) -> dict[str, int]:
    """Part of a fused linear -> its outputs, in order."""
    shapes = layer_shapes(shape, index)
    return {part: shapes[f"model.layers.{index}.{part}.weight"][0] for part in LINEAR_PARTS[name]}


def _linear(
    format_name: str, linear: Linear, rows: dict[str, int], prefix: str, name: str, dtype: torch.dtype
) -> Tensors:
    """The tensors of a fused linear's parts."""
    bias: Tensor | None = getattr(linear, "bias", None)
    stored, found, start = linear.stored(), dict[str, Tensor](), 0
    dense = linear.dequantize().to(dtype) if stored is None else None
    for part, count in rows.items():
        own, stem = slice(start, start + count), f"{prefix}{part}."
        start += count
        if bias is not None:
            found[f"{stem}bias"] = bias[own]
        if dense is not None:
            found[f"{stem}weight"] = dense[own]
        elif stored is not None and format_name == "w8a8":
            found[f"{stem}weight"] = (stored.quantized.codes[own] ^ 128).view(torch.int8)
            found[f"{stem}weight_scale"] = stored.quantized.fit.scale[own]
        elif stored is not None:
            found.update({f"{stem}{key}": tensor for key, tensor in packed(stored, own, f"{prefix}{name}").items()})
    return found


def packed(stored: Stored, rows: slice, name: str) -> Tensors:
    """Some rows of a weight in the layout pack-quantized: suffix -> tensor.

    Raises:
        Unsupported: offsets that are no whole steps; says `name`.
    """
    codes, fit, grid = stored.quantized.codes[rows], stored.quantized.fit.of_rows(rows), stored.grid
    found = {
        "weight_packed": pack_stream(codes, grid.bits),
        "weight_scale": fit.scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    zero = grid.zero_points(fit)
    if zero is not None and fit.offset is not None:
        steps = fit.offset.float() / divisor(fit.scale)
        if float((grid.middle - steps - zero.float()).abs().max()) > _MAX_OFF_GRID:
            raise Unsupported(f"{name}: offsets are no whole steps (method hqq), which compressed-tensors cannot hold")
        found["weight_zero_point"] = pack_stream(zero.t().contiguous(), grid.bits).t()
    return found


def _scheme(format_name: str, linear: Linear) -> dict[str, Any] | None:
    stored = linear.stored()
    if stored is None:
        return None
    grid = stored.grid
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.is_symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations = None
    if format_name == "w8a8":
        activations = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "dynamic": True,
            "actorder": None,
            "block_structure": None,
            "observer": None,
            "observer_kwargs": {},
        }
    return {"weights": weights, "input_activations": activations, "output_activations": None}


def _quantization_config(format_name: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    if len(groups) == 1:
        groups[0]["targets"] = ["Linear"]
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if format_name == "w8a8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
