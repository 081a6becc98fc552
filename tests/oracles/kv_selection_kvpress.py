"""kvpress's side of `kv_selection.py`: its presses on the same model in transformers, nothing of ours.

asked:    ids.LENGTH [T]; note: path of the model, window, kernel, cases
answered: scores.LENGTH [L, H_kv, T - W], what SnapKVPress gives to the rows before the window
          CASE [L, H_kv, T] bool, the rows that it keeps: those of the full cache that are still in the compressed one,
          and for ada_kv, which removes nothing, those that it does not mask
"""

import sys
from pathlib import Path

import torch
import transformers
from kvpress import AdaKVPress, PyramidKVPress, SnapKVPress
from kvpress.presses.base_press import BasePress
from torch import Tensor

from tests.oracles.exchange import read, signature, write

torch.set_num_threads(1)
asked, note = read(Path(sys.argv[1]))
model = transformers.AutoModelForCausalLM.from_pretrained(note["model"], dtype=torch.float32).eval()
attentions = [layer.self_attn for layer in model.model.layers]
window = {"window_size": note["window"], "kernel_size": note["kernel"]}


class Scored(SnapKVPress):
    """Keeps the scores of each layer."""

    def score(self, *args, **kwargs):
        scores = super().score(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), scores[0]]
        return scores


def press_of(case: dict) -> BasePress:
    ratio = case["ratio"]
    if case["policy"] == "pyramidkv":
        return PyramidKVPress(compression_ratio=ratio, beta=case["beta"], **window)
    snapkv = SnapKVPress(compression_ratio=ratio, **window)
    return AdaKVPress(snapkv, alpha_safeguard=case["alpha"]) if case["policy"] == "ada_kv" else snapkv


@torch.no_grad()
def keys(ids: Tensor, press: BasePress | None) -> list[Tensor]:
    """[H_kv, rows, D] of each layer's cache after the prompt."""
    cache = transformers.DynamicCache()
    if press is None:
        model.model(ids[None], past_key_values=cache)
    else:
        with press(model):
            model.model(ids[None], past_key_values=cache)
    return [layer.keys[0] for layer in cache.layers]


def found_again(full: Tensor, kept: Tensor) -> Tensor:
    """[T] bool: which rows of full [T, D] are those of kept [K, D], bit for bit."""
    place = {row.numpy().tobytes(): index for index, row in enumerate(full)}
    rows = [place[row.numpy().tobytes()] for row in kept]
    if len(place) != len(full) or len(set(rows)) != len(rows):
        raise SystemExit("two rows have the same key")
    return torch.zeros(len(full), dtype=torch.bool).index_fill_(0, torch.tensor(rows), True)


found = {}
for length in sorted({case["num_tokens"] for case in note["cases"].values()}):
    ids = asked[f"ids.{length}"]
    full = keys(ids, None)
    scored = Scored(compression_ratio=0.5, **window)
    keys(ids, scored)
    found[f"scores.{length}"] = torch.stack(scored.seen)[..., : -note["window"]]
    for name, case in note["cases"].items():
        if case["num_tokens"] != length:
            continue
        compressed = keys(ids, press_of(case))
        if case["policy"] == "ada_kv":
            kept = torch.ones(len(full), *full[0].shape[:2], dtype=torch.bool)
            for layer, attention in enumerate(attentions):
                _, head, row = attention.masked_key_indices
                kept[layer, head, row] = False
                attention.masked_key_indices = None
        else:
            pairs = [zip(*layer, strict=True) for layer in zip(full, compressed, strict=True)]
            kept = torch.stack([torch.stack([found_again(*head) for head in layer]) for layer in pairs])
        found[name] = kept
write(Path(sys.argv[2]), found, signature("kvpress", "transformers"))
