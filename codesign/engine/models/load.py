"""Checkpoint: the tensors of a local Hugging Face directory, read a few at a time.

    config.json, and model.safetensors or model.safetensors.index.json with its shards

Nothing in the directory is trusted. Files of pickled tensors are never opened: unpickling runs code. A shard is opened
for each read and closed again, so that the pages of what was read do not stay in the process.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codesign.engine.models.config_values import read_json
from codesign.errors import InputError, Unsupported

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FP16_MAX = 65504.0


class Checkpoint:
    """Args:
    path: the directory.
    dtype: what the tensors will be converted to; says which values are too large.

    Raises:
        InputError, Unsupported: no such directory, only pickled weights, an index that is wrong.
    """

    def __init__(self, path: Path, *, dtype: torch.dtype) -> None:
        if not path.is_dir():
            raise InputError("is not a directory", file=path)
        self.path, self._dtype = path, dtype
        self._shard_of = self._find_shards()

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return self._read(shapes, _FLOATS)

    def _read(self, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        by_shard: dict[Path, list[str]] = {}
        for name in shapes:
            if name not in self._shard_of:
                raise InputError("the checkpoint has no such tensor", file=self.path, key=name)
            by_shard.setdefault(self._shard_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for shard, names in by_shard.items():
            with _opened(shard) as handle:
                held = set(handle.keys())
                for name in names:
                    if name not in held:
                        raise InputError("the index names this tensor, the file does not hold it", file=shard, key=name)
                    found[name] = self._tensor(handle, shard, name, shapes[name], kinds)
        return found

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._shard_of.values()))

    def has(self, name: str) -> bool:
        return name in self._shard_of

    def finish(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """A tensor that the model does not use is a sign that config.json describes another model."""
        unused = [name for name in sorted(set(self._shard_of) - set(expected)) if not _may_be_left(name)]
        if unused:
            raise InputError(
                f"the checkpoint holds {len(unused)} tensors that the architecture of config.json does not have, "
                f"such as {unused[0]}",
                file=self.path,
                key=unused[0],
            )

    def _find_shards(self) -> dict[str, Path]:
        single, index = self.path / _SINGLE, self.path / _INDEX
        if single.is_file():
            with _opened(single) as handle:
                return dict.fromkeys(handle.keys(), single)
        if index.is_file():
            return self._read_index(index)
        pickled = sorted(path.name for path in self.path.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise Unsupported(
                f"{self.path}: holds pickled weights only ({pickled[0]}); loading them would run code from the file. "
                "Save the model as safetensors (transformers: model.save_pretrained(DIR))"
            )
        raise InputError(f"holds neither {_SINGLE} nor {_INDEX}", file=self.path)

    def _read_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError("must map tensor names to file names", file=index, key="weight_map")
        for name, shard in weight_map.items():
            # A plain file name: neither a path out of the directory nor another kind of file.
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise InputError(
                    f"must be the name of a .safetensors file in the same directory, got {shard!r:.80}",
                    file=index,
                    key=f"weight_map.{name}",
                )
        return {name: self.path / shard for name, shard in weight_map.items()}

    def _tensor(
        self, handle: Any, shard: Path, name: str, shape: tuple[int, ...], kinds: Mapping[str, torch.dtype]
    ) -> Tensor:
        try:
            view = handle.get_slice(name)
            held, kind = tuple(view.get_shape()), view.get_dtype()
            if held != shape:
                raise InputError(f"has shape {list(held)}, config.json asks for {list(shape)}", file=shard, key=name)
            if kind not in kinds:
                raise Unsupported(f"{shard}: {name}: dtype {kind} is not supported (supported: {', '.join(kinds)})")
            tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot be read: {error}", file=shard, key=name) from error
        if not tensor.is_floating_point():
            return tensor
        # A sum is one cheap pass and lets no NaN or infinity through; only then look closely (a sum may overflow).
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise InputError("holds values that are not finite", file=shard, key=name)
        if self._dtype == torch.float16 and tensor.dtype != torch.float16 and tensor.abs().max() > _FP16_MAX:
            raise Unsupported(f"{shard}: {name}: holds values beyond the range of fp16; choose dtype bf16 or fp32")
        return tensor


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises InputError."""
    if not path.is_dir():
        raise InputError("is not a directory", file=path)
    return read_json(path / "config.json")


def _may_be_left(name: str) -> bool:
    """Tied checkpoints may carry the head a second time; old ones carry RoPE's frequencies."""
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, json.JSONDecodeError, ValueError) as error:
        raise InputError(f"is not a readable safetensors file: {error}", file=path) from error
