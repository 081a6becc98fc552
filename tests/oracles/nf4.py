"""nf4 against bitsandbytes: equal codebooks and codes; what the double quantisation of scales costs on both sides.

    python -m tests.oracles.nf4 ORACLE_PYTHON

bitsandbytes picks codes by the exact scale and quantises scales to 256 unevenly spaced values afterwards. Ours are 255
evenly spaced ones, and codes are picked by the scale as stored. So codes are compared for the exact scales, and for
stored scales it is asked that ours lose no more than theirs do, in the scales and in the weights.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from codesign.engine.quantize.grid import Fit
from codesign.engine.quantize.nf4_grid import BLOCK, Nf4Grid, levels
from tests.oracles.exchange import Tensors, ask, keep_tensors, provenance

SEED = 20261125


def weight_of_blocks() -> Tensor:
    """[32, 1024] in values of bf16: normal, with a spread that differs from block to block, and a block of zeros."""
    generator = torch.Generator().manual_seed(SEED)
    spread = torch.exp(0.3 * torch.randn(32, 1024 // BLOCK, 1, generator=generator)) * 0.05
    weight = torch.randn(32, 1024 // BLOCK, BLOCK, generator=generator) * spread
    weight[3, 5] = 0
    return weight.flatten(1).bfloat16().float()


def our_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """[out, in] for these scales."""
    return Nf4Grid().encode(weight.unflatten(1, (-1, BLOCK)), Fit(scale)).flatten(1)


def losses(theirs: Tensors) -> dict[str, tuple[float, float]]:
    """Relative errors (ours, theirs) of stored scales, and of weights by them."""
    weight, grid = theirs["weight"].float(), Nf4Grid()
    fit = grid.fit(weight)
    dequantized = grid.decode(theirs["codes"].unflatten(1, (-1, BLOCK)), Fit(theirs["absmax_restored"])).flatten(1)
    return {
        "scales": (_relative(fit.scale, theirs["absmax"]), _relative(theirs["absmax_restored"], theirs["absmax"])),
        "weights": (_relative(grid.dequantize(grid.quantize(weight, fit)), weight), _relative(dequantized, weight)),
    }


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.double().norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path, help="of an environment with bitsandbytes")
    weight = weight_of_blocks()
    theirs, signature = ask(parser.parse_args().python, "nf4_bitsandbytes", {"weight": weight}, {})
    theirs["weight"] = weight.bfloat16()
    has_levels = torch.equal(levels(), theirs["codebook"])
    num_other = int((our_codes(weight, theirs["absmax"]) != theirs["codes"]).sum())
    lost = losses(theirs)
    print(f"nf4: codebook {'equal' if has_levels else 'DIFFERENT'}, {num_other} of {weight.numel()} codes differ")
    for name, (ours, other) in lost.items():
        print(f"  relative error of {name}: ours {ours:.6f}, bitsandbytes {other:.6f}   allowed: not more")
    if not has_levels or num_other or any(ours > other for ours, other in lost.values()):
        return 1
    figures = {name: {"ours": round(ours, 7), "bitsandbytes": round(other, 7)} for name, (ours, other) in lost.items()}
    settings = {"seed": SEED, "relative_errors": figures, "notes": (__doc__ or "").splitlines()}
    made = provenance({"oracle": "bitsandbytes", **signature, **settings}, "tests/oracles/nf4.py")
    keep_tensors("nf4", theirs, {"provenance": made})
    return 0


if __name__ == "__main__":
    sys.exit(main())
