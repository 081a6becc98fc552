"""What a draft must share with its target, said by name when it does not."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from codesign.bundled import draft_path, target_path
from codesign.engine.build import build_engine
from codesign.engine.models.tiny import tiny_spec
from codesign.errors import InputError, Unsupported
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.driving import DEFAULTS, generate, request

BUNDLED = ModelSpec(name="bundled", path=str(target_path()))


def build(model: ModelSpec, **knobs: Any) -> Any:
    speculate = {"name": "draft_model", "adaptive": False, **knobs}
    return build_engine(model, EngineConfig.from_dict({**DEFAULTS, "speculate": speculate}))


def test_a_model_without_a_draft_says_where_one_is_named() -> None:
    with pytest.raises(Unsupported, match="'tiny-LlamaForCausalLM' names no draft; give `draft:` beside `model:`"):
        build(tiny_spec())


def test_a_draft_with_another_vocabulary_is_refused() -> None:
    spec = dataclasses.replace(tiny_spec(), draft=tiny_spec(vocab_size=127))

    with pytest.raises(Unsupported, match=r"vocabulary of 127 tokens, model 'tiny-LlamaForCausalLM' one of 128"):
        build(spec)


def test_a_draft_whose_tokens_have_other_names_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(draft_path(), folder)
    plain = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = plain["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(plain))

    with pytest.raises(Unsupported, match="the same ids to different tokens"):
        build(BUNDLED, draft=str(folder))


def test_a_tokenizer_that_is_only_written_otherwise_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "reformatted"
    shutil.copytree(draft_path(), folder)
    plain = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(plain, indent=3))

    assert generate(build(BUNDLED, draft=str(folder)), request("a", 5, 4))


def test_a_draft_that_cannot_see_as_far_is_refused() -> None:
    spec = dataclasses.replace(tiny_spec(), draft=tiny_spec(max_position_embeddings=100))

    with pytest.raises(Unsupported, match="max_model_len 256 is longer than the 100 positions"):
        build(spec)


def test_the_drafts_weights_have_a_format_of_their_own() -> None:
    """A format that cannot hold them names the draft: 160 inputs are no multiple of 64."""
    spec = dataclasses.replace(tiny_spec(), draft=tiny_spec(seed=1))
    native, int8 = (build(spec, draft_weights=name).facts()["bytes"] for name in ("native", "int8"))

    assert int8["draft_weights"] < native["draft_weights"] and int8["weights"] == native["weights"]
    with pytest.raises(Unsupported, match="draft 'tiny-LlamaForCausalLM': weight format 'int3' cannot hold"):
        build(spec, draft_weights="int3")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens must be a whole number from 1 to 64, got 0"),
        ({"num_draft_tokens": True}, "num_draft_tokens must be a whole number"),
        ({"adaptive": 1}, "adaptive must be true or false, got 1"),
        ({"draft": ""}, "draft must be the directory of a model, got ''"),
        ({"draft_weights": "int5"}, "draft_weights must be a weight format"),
    ],
)
def test_wrong_knobs_are_named(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EngineConfig.from_dict({"speculate": {"name": "draft_model", **knobs}}).resolve()


def test_a_draft_that_is_not_there_is_a_mistake_of_the_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        build(BUNDLED, draft=str(tmp_path / "nowhere"))
