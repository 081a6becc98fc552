from pathlib import Path

import pytest
import torch

from codesign.bundled import draft_path
from codesign.bundled.model import Llama, load_pretrained, save_pretrained


@torch.inference_mode()
def test_plain_model_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(draft_path(), dtype=torch.float32)
    token_ids = torch.arange(100, 140).view(2, 20)

    torch.testing.assert_close(load_pretrained(draft_path())(token_ids), oracle(token_ids).logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_cached_decoding_agrees_with_one_forward_pass() -> None:
    model = load_pretrained(draft_path())
    token_ids = torch.arange(100, 130).view(1, 30)
    caches = model.new_caches(1, 30)
    parts = [model(part, caches) for part in token_ids.split([10, 1, 19], dim=1)]

    torch.testing.assert_close(torch.cat(parts, 1), model(token_ids), atol=1e-4, rtol=1e-4)


def test_saved_model_loads_back(tmp_path: Path) -> None:
    model = load_pretrained(draft_path())
    save_pretrained(model, tmp_path, end_of_text_id=0)
    loaded: Llama = load_pretrained(tmp_path)

    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), loaded.parameters(), strict=True))
