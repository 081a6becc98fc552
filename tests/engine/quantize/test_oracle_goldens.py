"""Our side, computed again, against what other projects gave (`make oracles` writes these files and says how)."""

import json
from pathlib import Path

import pytest
import torch

from codesign.engine.quantize.nf4_grid import levels
from tests.oracles import gptq, layouts, nf4
from tests.oracles.exchange import GOLDEN, read

_GPTQ = json.loads((GOLDEN / "gptq.json").read_text())["errors"]


@pytest.fixture(scope="module")
def gptq_layers() -> dict[str, gptq.Layer]:
    return gptq.layers()


@pytest.mark.parametrize("name", _GPTQ)
def test_gptq_loses_what_llm_compressor_loses(gptq_layers: dict[str, gptq.Layer], name: str) -> None:
    golden, stored = _GPTQ[name], []

    errors = gptq.our_errors(gptq_layers[name])

    assert {case for case, _ in errors} == golden.keys()
    for (case, storage), error in errors.items():
        oracle = golden[case][storage]["llm_compressor"]
        if storage == "exact":
            assert error == pytest.approx(oracle, rel=gptq.TOLERANCE), case
        else:
            stored.append(error / oracle)
    assert gptq.geometric_mean(stored) == pytest.approx(1, abs=gptq.TOLERANCE)


def test_nf4_has_the_codebook_and_picks_the_codes_of_bitsandbytes() -> None:
    theirs, _ = read(GOLDEN / "nf4.safetensors")

    assert torch.equal(levels(), theirs["codebook"])
    assert torch.equal(nf4.our_codes(theirs["weight"].float(), theirs["absmax"]), theirs["codes"])


def test_nf4_loses_no_more_by_its_stored_scales_than_bitsandbytes() -> None:
    theirs, note = read(GOLDEN / "nf4.safetensors")

    for name, (ours, other) in nf4.losses(theirs).items():
        assert ours <= other
        assert ours == pytest.approx(note["provenance"]["relative_errors"][name]["ours"], rel=1e-4)


@pytest.mark.parametrize(
    ("oracle", "case"),
    [pytest.param(oracle, case, id=case.name) for oracle, cases in layouts.CASES.items() for case in cases],
)
def test_packed_words_are_those_of_who_defines_the_layout(oracle: str, case: layouts.Case) -> None:
    golden, _ = read(GOLDEN / f"layouts_{oracle}.safetensors")
    own = layouts.of_case(golden, case.name)
    meant = {part: own.pop(part) for part in ("codes", "zero", "scale", "groups") if part in own}

    assert not layouts.differences(case, meant, own)


@pytest.mark.parametrize("path", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_every_golden_says_where_it_came_from(path: Path) -> None:
    note = json.loads(path.read_text()) if path.suffix == ".json" else read(path)[1]

    assert {"oracle", "versions", "date", "command", "seed", "notes"} <= note["provenance"].keys()
