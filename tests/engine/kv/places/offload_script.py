"""Run by itself: an engine whose cache is far larger than its weights, all of it written. One JSON line per stage.

python offload_script.py PLACE      {"stage": "built", ...}, {"stage": "used", ...}, then on a line of input
                                    {"stage": "closed", ...}, and on the next one it ends
"""

import json
import os
import sys
from pathlib import Path

import torch

from codesign.engine.attention.layer import Attention
from codesign.engine.build import build_engine
from codesign.engine.models.tiny import tiny_spec
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams

CONFIG = {"dtype": "fp32", "max_batch_size": 8, "max_model_len": 8192}


def say(stage: str, **more: object) -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if key in KEYS}
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if os.environ["TMPDIR"] in line]
    print(json.dumps({"stage": stage, "mapped": len(mapped), **{key: 1024 * kib[key] for key in KEYS}, **more}))
    sys.stdout.flush()


KEYS = ("RssAnon", "RssFile", "RssShmem", "VmHWM")


def main(place: str) -> None:
    torch.set_num_threads(1)
    model = tiny_spec(max_position_embeddings=8192)
    build_engine(model, EngineConfig(dtype="fp32", max_batch_size=1, max_model_len=16)).close()  # what is loaded once
    say("before")
    engine = build_engine(model, EngineConfig.from_dict({**CONFIG, "kv": {"place": place}}))
    facts = engine.facts()
    say("built", kv=facts["bytes"]["kv"], kv_place=facts["resolved"]["kv_place"])
    attention = engine.parts.attention
    assert isinstance(attention, Attention)
    for part in (*attention.store.key, *attention.store.value):
        part.fill_(1.0)
    engine.submit(Request(request_id="a", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4)))
    while engine.has_work:
        engine.step()
    say("used")
    sys.stdin.readline()
    del attention, part
    engine.close()
    say("closed")
    sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1])
