"""A script for torchrun: rank 0 builds two engines on all ranks, one after the other, and says how they compare."""

import json
import os

import torch

from codesign.engine.models.tiny import tiny_spec
from codesign.engine.parallel import node
from codesign.errors import Unsupported
from tests.engine.parallel.comparing import run

CONFIG = {"dtype": "fp32", "max_batch_size": 2, "max_model_len": 32}
TEXTS = [[1, 2, 3, 4, 5, 6]]


def main() -> None:
    torch.set_num_threads(1)
    if os.environ["RANK"] != "0":
        node.work(int(os.environ["RANK"]))
        return
    try:
        expected = run(tiny_spec(), CONFIG, "single", TEXTS, num_prefill=3)
        found = {}
        for plan in ("tp2", "pp2"):
            ran = run(tiny_spec(), CONFIG, plan, TEXTS, num_prefill=3)
            found[plan] = float((ran.logits - expected.logits).abs().max())
        try:
            run(tiny_spec(), CONFIG, "tp2xpp2", TEXTS, num_prefill=3)
        except Unsupported as error:
            found["tp2xpp2"] = str(error)
        print(json.dumps(found))
    finally:
        node.send_home()


if __name__ == "__main__":
    main()
