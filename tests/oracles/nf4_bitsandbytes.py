"""bitsandbytes' side of `nf4.py`.

asked:    weight [out, in] fp32
answered: codebook [16]; codes [out, in] uint8; absmax, absmax_restored (after its double quantisation) [out, in / 64]
"""

import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from tests.oracles.exchange import read, signature, write

asked, _ = read(Path(sys.argv[1]))
weight = asked["weight"]
packed, single = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
also_packed, double = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
if not torch.equal(packed, also_packed):
    raise SystemExit("codes depend on how scales are stored")
restored = bnb.dequantize_blockwise(double.absmax, double.state2) + double.offset
found = {
    "codebook": single.code,
    "codes": torch.stack([packed >> 4, packed & 15], dim=-1).view(weight.shape),  # the first weight in the high bits
    "absmax": single.absmax.view(weight.shape[0], -1),
    "absmax_restored": restored.view(weight.shape[0], -1),
}
write(Path(sys.argv[2]), found, signature("bitsandbytes"))
