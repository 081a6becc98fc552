"""Packed layouts against those who define them: compressed-tensors, and GPTQModel for gptq (versions 1, 2) and awq.

    python -m tests.oracles.layouts COMPRESSED_TENSORS_PYTHON GPTQMODEL_PYTHON

Codes, zero points and scales are drawn; the oracle gets the weights that they mean and packs them. Equal must be: what
our importer reads in the oracle's tensors, the oracle's tensors and those of the plain writers of our tests, and for
compressed-tensors also those of our exporter, and what the oracle reads in ours.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from codesign.engine.quantize.export import packed
from codesign.engine.quantize.grid import AffineGrid, Fit, Quantized
from codesign.engine.quantize.layouts.awq import Awq
from codesign.engine.quantize.layouts.compressed_tensors import CompressedTensors
from codesign.engine.quantize.layouts.gptq import Gptq
from codesign.engine.quantize.linear import Stored
from tests.engine.quantize.layouts import writers
from tests.oracles.exchange import Tensors, ask, keep_tensors, provenance

SEED = 20261125


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Args:
    kind: compressed_tensors, gptq, gptq_v2 or awq.
    group_size: None is one group a row.
    """

    kind: str
    bits: int
    num_out: int
    num_in: int
    group_size: int | None = 32
    symmetric: bool = False
    act_order: bool = False

    @property
    def name(self) -> str:
        groups = f"g{self.group_size}" if self.group_size else "rows"
        grid = " symmetric" if self.symmetric else ""
        return f"{self.kind} {self.bits} bits {groups}{grid}{' act-order' if self.act_order else ''}"

    @property
    def num_groups(self) -> int:
        return self.num_in // (self.group_size or self.num_in)


CASES = {
    "compressed_tensors": [
        *(
            Case(kind="compressed_tensors", bits=bits, num_out=20, num_in=96, symmetric=symmetric)
            for bits in (2, 3, 4, 8)
            for symmetric in (True, False)
        ),
        # rows that end within a word
        Case(kind="compressed_tensors", bits=3, num_out=20, num_in=40, group_size=None),
        Case(kind="compressed_tensors", bits=4, num_out=20, num_in=44, group_size=None, symmetric=True),
    ],
    "gptqmodel": [
        *(Case(kind=kind, bits=bits, num_out=32, num_in=64) for kind in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)),
        Case(kind="gptq", bits=4, num_out=32, num_in=64, act_order=True),
        Case(kind="awq", bits=4, num_out=32, num_in=64),
    ],
}


def drawn(case: Case, generator: torch.Generator) -> Tensors:
    """codes [out, in], zero [out, groups] uint8; scale [out, groups] in fp32, values that bf16 and fp16 hold too;
    groups [in], the group of each input."""
    shape, top = (case.num_out, case.num_groups), 2**case.bits
    zero = torch.full(shape, top // 2)
    if not case.symmetric:
        # version 1 stores zero points minus 1, which GPTQModel subtracts from whole words: a 0 would borrow
        zero = torch.randint(1 if case.kind == "gptq" else 0, top, shape, generator=generator)
    g_idx = torch.arange(case.num_in) // (case.num_in // case.num_groups)
    return {
        "codes": torch.randint(0, top, (case.num_out, case.num_in), generator=generator).to(torch.uint8),
        "zero": zero.to(torch.uint8),
        "scale": (0.01 + 0.1 * torch.rand(shape, generator=generator)).bfloat16().float(),
        "groups": g_idx[torch.randperm(case.num_in, generator=generator)] if case.act_order else g_idx,
    }


def exported(case: Case, meant: Tensors) -> Tensors:
    """What our exporter writes for these codes."""
    grid = AffineGrid(
        bits=case.bits, group_size=case.group_size, is_symmetric=case.symmetric, scale_dtype=torch.float32
    )
    offset = None if case.symmetric else (grid.middle - meant["zero"].float()) * meant["scale"]
    return packed(Stored(Quantized(meant["codes"], Fit(meant["scale"], offset)), grid), slice(None), case.name)


def written(case: Case, meant: Tensors) -> Tensors:
    """What the plain writers of our tests write."""
    codes, zero, scale, g_idx = (meant[part] for part in ("codes", "zero", "scale", "groups"))
    if case.kind == "awq":
        return writers.awq(codes, zero, scale)
    if case.kind == "compressed_tensors":
        plain = writers.compressed(codes, None if case.symmetric else zero, scale, bits=case.bits)
        return {**plain, "weight_scale": scale}
    return writers.gptq(codes, zero, scale, g_idx, bits=case.bits, version=2 if case.kind == "gptq_v2" else 1)


def differences(case: Case, meant: Tensors, theirs: Tensors) -> list[str]:
    """What is not equal, in words."""
    found = []
    sides = {"plain writer": written(case, meant)}
    if case.kind == "compressed_tensors":
        sides["exporter"] = exported(case, meant)
    for side, own in sides.items():
        for suffix in sorted(theirs.keys() | own.keys()):
            if suffix not in theirs or suffix not in own or not torch.equal(own[suffix], theirs[suffix]):
                found.append(f"{side}: {suffix}")
    for part, value in imported(case, theirs).items():
        if not torch.equal(value, meant[part]):
            found.append(f"importer: {part}")
    return found


def imported(case: Case, theirs: Tensors) -> Tensors:
    """codes, zero and scale as our importer reads them, with inputs in their own order."""
    layouts = {
        "compressed_tensors": CompressedTensors(bits=case.bits, group_size=case.group_size, symmetric=case.symmetric),
        "gptq": Gptq(bits=case.bits, group_size=case.group_size, zero_offset=1),
        "gptq_v2": Gptq(bits=case.bits, group_size=case.group_size, zero_offset=0),
        "awq": Awq(group_size=case.group_size),
    }
    read = layouts[case.kind].decode(theirs, case.num_out, case.num_in)
    codes = read.codes
    if read.order is not None:
        codes = torch.empty_like(read.codes)
        codes[:, read.order] = read.codes
    return {"codes": codes, "zero": read.zero, "scale": read.scale.float()}


def of_case(tensors: Tensors, name: str) -> Tensors:
    """Those whose name starts with that of the case, without it."""
    return {key.removeprefix(f"{name}."): own for key, own in tensors.items() if key.startswith(f"{name}.")}


def dense(case: Case, meant: Tensors) -> Tensor:
    """[out, in] fp32."""
    steps = meant["codes"].float() - meant["zero"].float()[:, meant["groups"]]
    return steps * meant["scale"][:, meant["groups"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed_tensors", type=Path, help="Python of an environment with compressed-tensors")
    parser.add_argument("gptqmodel", type=Path, help="Python of an environment with GPTQModel")
    pythons, num_different = vars(parser.parse_args()), 0
    for oracle, cases in CASES.items():
        generator, meant = torch.Generator().manual_seed(SEED), Tensors()
        for case in cases:
            own = drawn(case, generator)
            meant |= {f"{case.name}.{part}": tensor for part, tensor in own.items()}
        asked = dict(meant)
        for case in cases if oracle == "compressed_tensors" else []:
            ours = exported(case, of_case(meant, case.name))
            asked |= {f"{case.name}.ours.{suffix}": tensor for suffix, tensor in ours.items()}
        note = {"cases": {case.name: dataclasses.asdict(case) for case in cases}}
        theirs, signature = ask(pythons[oracle], f"layouts_{oracle}", asked, note)
        found = []
        for case in cases:
            own, other = of_case(meant, case.name), of_case(theirs, case.name)
            restored = other.pop("restored", None)
            found += [f"{case.name}: {what}" for what in differences(case, own, other)]
            if restored is not None and not torch.equal(restored, dense(case, own)):
                found.append(f"{case.name}: what the oracle reads in ours")
        print(
            f"layouts: {len(cases)} weights packed by {oracle}: {f'{len(found)} differences' if found else 'all equal'}"
        )
        print("".join(f"  {line}\n" for line in found), end="")
        num_different += len(found)
        if not found:
            kept = {key: tensor for key, tensor in theirs.items() if not key.endswith(".restored")}
            settings = {"seed": SEED, "notes": (__doc__ or "").splitlines()}
            made = provenance({"oracle": oracle, **signature, **settings}, "tests/oracles/layouts.py")
            keep_tensors(f"layouts_{oracle}", {**meant, **kept}, {"provenance": made})
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
