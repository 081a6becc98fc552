"""Reads directories that `codesign` exported with transformers and compressed-tensors, in an environment of its own.

python tests/oracles/exported_weights_reader.py DIR...      one JSON line of logits per directory, on stdout
"""

import json
import sys
from pathlib import Path

import torch
import transformers

TOKENS = list(range(1, 41))


def options(folder: str) -> dict[str, object]:
    """Asymmetric weights are dequantised on loading: compressed-tensors 0.20 makes room for unpacked zero points."""
    plain = json.loads((Path(folder) / "config.json").read_text()).get("quantization_config", {})
    groups = plain.get("config_groups", {}).values()
    if all(group["weights"]["symmetric"] for group in groups):
        return {}
    return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options(folder)).eval()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    print(json.dumps({"folder": folder, "logits": logits.tolist()}), flush=True)
