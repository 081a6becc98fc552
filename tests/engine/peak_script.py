"""Run as a program: what building each weight format needs at its peak.

    python peak_script.py FOLDER      prints {format: [peak bytes, bytes of the built weights, bytes of one layer]}

A process of its own, because the peak of resident memory is the process's.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from codesign.engine import weights
from codesign.engine.build import build_engine
from codesign.engine.memory import reset_peak_memory, return_freed_memory
from codesign.engine.models.assemble import all_shapes, layer_shapes
from codesign.engine.models.random import RandomWeights
from codesign.engine.models.shape import ModelShape, read_shape
from codesign.engine.models.tiny import tiny_config
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 512}
FORMATS = ("native", "int8", "w8a8", "int4", "nf4", "int3", "int2")


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def checkpoint(folder: Path, num_layers: int) -> tuple[ModelSpec, ModelShape]:
    config = tiny_config(num_hidden_layers=num_layers, tie_word_embeddings=True, **SIZES)
    shape = read_shape(config)
    folder.mkdir()
    tensors = RandomWeights(shape, seed=0, dtype=torch.bfloat16).read(dict(all_shapes(shape)))
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSpec(name=folder.name, path=str(folder)), shape


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    weights.reset_peak_memory = lambda: None  # else the build forgets what packing took
    small, _ = checkpoint(folder / "small", 1)
    large, shape = checkpoint(folder / "large", 12)
    layer = 2 * sum(torch.Size(size).numel() for size in layer_shapes(shape, 0).values())
    found = {}
    for name in FORMATS:
        config = EngineConfig(max_batch_size=1, max_model_len=64, weights=Choice(name))
        build_engine(small, config)  # what is imported, compiled and allocated once
        return_freed_memory()
        reset_peak_memory()
        before = resident("VmRSS")
        engine = build_engine(large, config)
        found[name] = [resident("VmHWM") - before, engine.facts()["bytes"]["weights"], layer]
        del engine
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
