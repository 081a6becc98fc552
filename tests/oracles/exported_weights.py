"""Does another stack read what we export? Small models of each architecture in each format, logits compared.

    python tests/oracles/exported_weights.py --python ORACLE_PYTHON

ORACLE_PYTHON has torch, transformers and compressed-tensors (`make oracles` makes that environment). Differences are
the largest of all logits, in units of their spread. Exits 1 when one is larger than its format explains: 1e-3, but 0.1
for asymmetric weights, whose offsets our kernels hold in 16 bits, and half as much again as rounding itself changes for
w8a8, because the two stacks round activations by scales that differ by 0.4 %.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from codesign.engine.build import build_engine
from codesign.engine.quantize.export import export_checkpoint
from codesign.engine.step import StepPlan
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.models.transformers_peer import peer, save

TOKENS = tuple(range(1, 41))
FORMATS = {
    "native": Choice("native"),
    "int8": Choice("int8"),
    "int4": Choice.of("int4", group_size=32),
    "int4 symmetric": Choice.of("int4", group_size=32, symmetric=True),
    "int3": Choice.of("int3", group_size=32),
    "int2": Choice.of("int2", group_size=32),
    "w8a8": Choice("w8a8"),
}


def our_logits(path: Path, config: EngineConfig) -> torch.Tensor:
    plan = StepPlan(
        slots=(0,),
        query_lens=(len(TOKENS),),
        token_ids=TOKENS,
        positions=tuple(range(len(TOKENS))),
        is_prompt=(True,),
        is_prompt_end=(True,),
        logits_rows=tuple(range(len(TOKENS))),
    )
    return build_engine(ModelSpec(name="model", path=str(path)), config).parts.runner.run(plan)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True)
    python = parser.parse_args().python
    is_worse = False
    with tempfile.TemporaryDirectory() as scratch:
        ours: dict[str, torch.Tensor] = {}
        allowed: dict[str, float] = {}
        for architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
            original = save(peer(architecture), Path(scratch) / architecture)
            for name, weights in FORMATS.items():
                config = EngineConfig(dtype="fp32", max_batch_size=1, max_model_len=64, weights=weights)
                target = Path(scratch) / f"{architecture} {name}"
                spec = ModelSpec(name="model", path=str(original))
                export_checkpoint(spec, config, target, dtype=torch.float32)
                ours[str(target)] = own = our_logits(original, config)
                allowed[str(target)] = 1e-3
                if name == "w8a8":
                    dense = our_logits(original, dataclasses.replace(config, weights=Choice("native")))
                    allowed[str(target)] = 1.5 * float((own - dense).abs().max() / own.std())
                elif name in ("int4", "int3", "int2"):
                    allowed[str(target)] = 0.1
        reader = Path(__file__).with_name("exported_weights_reader.py")
        done = subprocess.run([python, reader, *ours], capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
            return 1
        for line in done.stdout.splitlines():
            read = json.loads(line)
            own = ours[read["folder"]]
            difference = float((torch.tensor(read["logits"]) - own).abs().max() / own.std())
            is_worse |= difference > allowed[read["folder"]]
            print(f"{Path(read['folder']).name:36} {difference:.2e}   allowed {allowed[read['folder']]:.2e}")
    return int(is_worse)


if __name__ == "__main__":
    sys.exit(main())
