"""GPTQModel's side of `layouts.py`: packs weights that lie on a grid as gptq (both versions) and awq checkpoints.

asked:    CASE.codes, CASE.zero, CASE.scale, CASE.groups; note: cases
answered: "CASE.SUFFIX" as it packs them
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # its packer in Python, without a minute of compiling one in C++

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

from tests.oracles.exchange import read, signature, write

asked, note = read(Path(sys.argv[1]))
found = {}
for name, case in note["cases"].items():
    codes, zero, scale, g_idx = (asked[f"{name}.{part}"] for part in ("codes", "zero", "scale", "groups"))
    dense = torch.nn.Linear(codes.shape[1], codes.shape[0], bias=False)
    dense.weight.data = (codes.float() - zero.float()[:, g_idx]) * scale[:, g_idx]
    options = {
        "bits": case["bits"],
        "group_size": case["group_size"],
        "sym": False,
        "desc_act": case["act_order"],
        "in_features": codes.shape[1],
        "out_features": codes.shape[0],
        "bias": False,
    }
    if case["kind"] == "awq":
        module = AwqTorchLinear(**options)
        module.pack(dense, scale.half(), zero.half())
    else:
        module = TorchLinear(**options, format=FORMAT.GPTQ_V2)
        module.pack_block(dense, scale, zero.int(), g_idx.int())
        if case["kind"] == "gptq":
            convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=case["bits"], pack_dtype=torch.int32))
    for suffix, tensor in module.named_buffers():
        found[f"{name}.{suffix}"] = tensor
write(Path(sys.argv[2]), found, signature("gptqmodel"))
