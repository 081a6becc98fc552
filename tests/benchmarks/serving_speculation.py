"""Speculation parts of serving.py: draft model and n-gram for one stream, and where they must switch themselves off."""

import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from codesign.bundled import draft_path
from codesign.engine.engine import Engine
from codesign.engine.score import score
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request
from tests.benchmarks.serving_runs import (
    Setting,
    bar,
    bundled,
    engine_of,
    model,
    ratio,
    request,
    requests_of,
    run,
    text_prompts,
    turn_about,
)

NUM_DRAFT_TOKENS = 4
DRAFT_LAYERS = 2
ACCEPTANCE = 0.8


def on_bundled_pair(setting: Setting) -> dict[str, Any]:
    """One stream of held-out text, greedy, the bundled draft before the bundled target."""
    prompts = text_prompts(6, 128, seed=1)
    requests = [request(f"{index}", prompt, 96) for index, prompt in enumerate(prompts)]
    draft = {"name": "draft_model", "draft": str(draft_path()), "num_draft_tokens": NUM_DRAFT_TOKENS}
    engines = pair(bundled(), setting, {"off": "none", "draft model": draft}, max_model_len=256)
    found = single_stream("bundled pair", engines, requests, setting)
    gain = ratio(found["wall_s"]["off"], found["wall_s"]["draft model"])
    return {
        "what": f"{len(requests)} prompts of 128 tokens one after the other, 96 output tokens each, greedy, bf16",
        **found,
        "bars": [bar("bundled pair, one stream, draft model over none", gain, 1.2)],
    }


def on_truncated_pair(setting: Setting) -> dict[str, Any]:
    """A 0.4 B target whose later layers are quiet, and its first layers as draft: acceptance is set, cost is real."""
    with tempfile.TemporaryDirectory() as folder:
        target, draft, acceptance = truncated_pair(setting, Path(folder))
        requests = requests_of([(64, 64)] * 3, setting.vocab_size, seed="truncated")
        choice = {"name": "draft_model", "draft": str(draft), "num_draft_tokens": NUM_DRAFT_TOKENS}
        engines = pair(model(target), setting, {"off": "none", "draft model": choice}, max_model_len=256)
        found = single_stream("truncated pair", engines, requests, setting)
        gain = ratio(found["wall_s"]["off"], found["wall_s"]["draft model"])
    return {
        "what": f"{len(requests)} prompts of 64 tokens, 64 output tokens each; draft of {DRAFT_LAYERS} layers, later "
        f"layers of the target scaled until greedy acceptance is {ACCEPTANCE}",
        "acceptance": acceptance,
        **found,
        "bars": [bar(f"truncated pair, acceptance {acceptance:.2f}, draft model over none", gain, 1.5)],
    }


def copying(setting: Setting) -> dict[str, Any]:
    """n-gram on text that repeats its prompt, and on text that does not, where it must cost nothing."""
    prompts = repeating_prompts(6)
    requests = [request(f"{index}", prompt, 96) for index, prompt in enumerate(prompts)]
    ngram = {"name": "ngram", "num_draft_tokens": 8}
    engines = pair(bundled(), setting, {"off": "none", "n-gram": ngram}, max_model_len=512)
    copied = single_stream("copying", engines, requests, setting)
    new_text = [
        request(f"{index}", prompt, 96, temperature=1.0, seed=index)
        for index, prompt in enumerate(text_prompts(6, 128, seed=2))
    ]
    fresh = single_stream("new text", engines, new_text, setting)
    return {
        "what": "one stream: greedy after a repeated passage, then at temperature 1 after text that repeats little",
        "copying": copied,
        "new text": fresh,
        "bars": [
            bar("n-gram over none on copying text", ratio(copied["wall_s"]["off"], copied["wall_s"]["n-gram"]), 1.5),
            bar(
                "n-gram over none where it finds little", ratio(fresh["wall_s"]["off"], fresh["wall_s"]["n-gram"]), 0.97
            ),
        ],
    }


def switched_off(setting: Setting) -> dict[str, Any]:
    """A full batch, where verifying drafts costs more than they save: the measured table must say 0."""
    batch = 32
    requests = [
        request(f"{index}", prompt, 48, temperature=1.0, seed=index)
        for index, prompt in enumerate(text_prompts(2 * batch, 64, seed=3))
    ]
    draft = {"name": "draft_model", "draft": str(draft_path()), "num_draft_tokens": NUM_DRAFT_TOKENS}
    choices: dict[str, Any] = {"off": "none", "adaptive": draft, "fixed": {**draft, "adaptive": False}}
    engines = pair(bundled(), setting, choices, max_model_len=128, max_batch_size=batch)
    found = single_stream(f"batch of {batch}", engines, requests, setting)
    walls = found["wall_s"]
    return {
        "what": f"{len(requests)} requests at batch {batch}, 48 output tokens each at temperature 1, bundled pair",
        **found,
        "fixed_over_off": ratio(walls["off"], walls["fixed"]),
        "bars": [bar("adaptive speculation over none at a full batch", ratio(walls["off"], walls["adaptive"]), 0.97)],
    }


def pair(
    spec: ModelSpec, setting: Setting, choices: dict[str, Any], *, max_model_len: int, max_batch_size: int = 1
) -> dict[str, Engine]:
    return {
        name: engine_of(
            spec,
            setting.threads,
            max_batch_size=max_batch_size,
            max_model_len=max_model_len,
            max_step_tokens=max(512, max_batch_size * 10),
            speculate=own,
        )
        for name, own in choices.items()
    }


def single_stream(what: str, engines: dict[str, Engine], requests: list[Request], setting: Setting) -> dict[str, Any]:
    """Wall times in turns; requests one after the other where the engine has one slot."""
    tokens: dict[str, dict[str, list[int]]] = {}
    for engine in engines.values():
        run(engine, requests[:1])

    def wall_s(name: str, index: int) -> float:
        found = run(engines[name], requests)
        tokens[name] = dict(found.tokens)
        setting.say(f"{what} round {index}: {name}: {found.num_output / found.wall_s:.1f} tokens/s")
        return found.wall_s

    walls = turn_about(list(engines), setting.rounds, wall_s)
    base = tokens["off"]
    return {
        "wall_s": walls,
        "same_tokens": {
            name: sum(own[key] == base[key] for key in base) / len(base)
            for name, own in tokens.items()
            if name != "off"
        },
        "speculation": {name: engine.speculation_stats() for name, engine in engines.items() if name != "off"},
    }


def repeating_prompts(count: int) -> list[tuple[int, ...]]:
    """A passage, then its beginning again: a model that retrieves goes on with it."""
    return [(*passage, *passage[:32]) for passage in text_prompts(count, 160, seed=4)]


def truncated_pair(setting: Setting, folder: Path) -> tuple[Path, Path, float]:
    """(target, draft, measured greedy acceptance): layers after the draft's are scaled, found by bisection.

    At scale 0 the later layers add nothing to the residual stream and draft and target agree always; at 1 they are as
    strangers.
    """
    low, high, best = 0.0, 1.0, (2.0, 0.0, 0.0)
    target, draft = folder / "target", folder / "draft"
    write_draft(setting.model_dir, draft)
    for _ in range(7):
        scale = (low + high) / 2
        write_target(setting.model_dir, target, scale)
        found = greedy_acceptance(target, draft, setting)
        setting.say(f"truncated pair: later layers x {scale:.4f}: acceptance {found:.3f}")
        best = min(best, (abs(found - ACCEPTANCE), scale, found))
        low, high = (scale, high) if found > ACCEPTANCE else (low, scale)
        if abs(found - ACCEPTANCE) < 0.02:
            break
    write_target(setting.model_dir, target, best[1])
    return target, draft, best[2]


def write_target(source: Path, folder: Path, scale: float) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if (
            parts[1] == "layers"
            and int(parts[2]) >= DRAFT_LAYERS
            and name.endswith(("o_proj.weight", "down_proj.weight"))
        ):
            tensor *= scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder / "config.json")


def write_draft(source: Path, folder: Path) -> None:
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.startswith("model.layers.") and int(name.split(".")[2]) >= DRAFT_LAYERS)
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": DRAFT_LAYERS} | cut_lists(config)))


def cut_lists(config: dict[str, Any]) -> dict[str, Any]:
    """Keys of the configuration that list something per layer."""
    return {
        key: value[:DRAFT_LAYERS]
        for key, value in config.items()
        if isinstance(value, list) and len(value) == config["num_hidden_layers"]
    }


def greedy_acceptance(target: Path, draft: Path, setting: Setting) -> float:
    """Share of positions of the target's own greedy output where the draft would have said the same."""
    requests = requests_of([(64, 64)] * 4, setting.vocab_size, seed="acceptance")
    common = {"max_batch_size": 4, "max_model_len": 128, "max_step_tokens": 512}
    engine = engine_of(model(target), setting.threads, **common)
    out = run(engine, requests).tokens
    engine.close()
    texts = [[*own.prompt_token_ids, *out[own.request_id]] for own in requests]
    agreed: list[bool] = []

    def compare(index: int, position: int, logits: torch.Tensor) -> None:
        agreed.append(int(logits[0].argmax()) == texts[index][position + 1])

    judge = engine_of(model(draft), setting.threads, **common)
    score(judge, texts, num_prefill=64, on_logits=compare)
    judge.close()
    return statistics.mean(agreed)
