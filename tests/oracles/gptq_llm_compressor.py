"""llm-compressor's side of `gptq.py`: its own second moments, its own grids, its own rounding; nothing of ours.

asked:    LAYER.weight [out, in], LAYER.inputs [tokens, in]; note: cases and damping
answered: "CASE stored" and "CASE exact" [out, in] fp32, the weights that it rounds to; scales in bf16 and in fp32
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian

from tests.oracles.exchange import read, signature, write

torch.set_num_threads(1)
asked, note = read(Path(sys.argv[1]))
found = {}
for layer in note["layers"]:
    weight, inputs = asked[f"{layer}.weight"], asked[f"{layer}.inputs"]
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight
    hessian, num_samples = accumulate_hessian(inputs, module, make_empty_hessian(module), torch.zeros(()))
    for name, case in note["cases"].items():
        args = QuantizationArgs(
            num_bits=case["bits"],
            group_size=case["group_size"],
            symmetric=case["symmetric"],
            strategy="group",
            actorder="static" if case["act_order"] else None,
        )
        groups = weight.unflatten(1, (-1, case["group_size"]))
        for storage, dtype in (("exact", torch.float32), ("stored", torch.bfloat16)):
            scale, zero_point = calculate_qparams(groups.amin(2).to(dtype), groups.amax(2).to(dtype), args)
            rounded, _, fell_back = quantize_weight(
                weights=weight[None].clone(),  # it works in place
                hessians=(hessian / num_samples)[None].clone(),
                scale=scale[None],
                zero_point=zero_point[None],
                global_scale=None,
                quant_args=args,
                blocksize=128,
                percdamp=note["damping"],
            )
            if bool(fell_back.any()):
                raise SystemExit(f"{layer}: {name}: llm-compressor fell back to rounding")
            found[f"{layer}: {name} {storage}"] = rounded[0]
write(Path(sys.argv[2]), found, signature("llmcompressor", "compressed-tensors"))
