"""compressed-tensors' side of `layouts.py`: packs weights that lie on a grid, and reads what we packed.

asked:    CASE.codes, CASE.zero, CASE.scale, "CASE.ours.SUFFIX"; note: cases
answered: "CASE.SUFFIX" as it packs them; CASE.restored [out, in] fp32, what it reads in ours
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from tests.oracles.exchange import read, signature, write

asked, note = read(Path(sys.argv[1]))
found = {}
for name, case in note["cases"].items():
    args = QuantizationArgs(
        num_bits=case["bits"],
        symmetric=case["symmetric"],
        strategy="group" if case["group_size"] else "channel",
        group_size=case["group_size"],
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    codes, zero, scale = (asked[f"{name}.{part}"] for part in ("codes", "zero", "scale"))
    size = codes.shape[1] // zero.shape[1]
    steps = codes.float() - zero.float().repeat_interleave(size, dim=1)
    dense = {
        "weight": steps * scale.repeat_interleave(size, dim=1),
        "weight_scale": scale,
        "weight_zero_point": (zero.int() - 2 ** (case["bits"] - 1)).to(torch.int8),
    }
    for suffix, tensor in PackedQuantizationCompressor.compress(dense, scheme).items():
        found[f"{name}.{suffix}"] = tensor
    prefix = f"{name}.ours."
    ours = {key.removeprefix(prefix): tensor for key, tensor in asked.items() if key.startswith(prefix)}
    found[f"{name}.restored"] = PackedQuantizationCompressor.decompress(ours, scheme)["weight"]
write(Path(sys.argv[2]), found, signature("compressed-tensors"))
