"""Where a profile's model comes from: bundled, a directory, a pinned hub id, or an architecture with random weights.

    model: bundled
    model: ../models/my-model
    model: {id: org/name, revision: 40 hex digits of a commit}
    model: {weights: random, name: 8B shape, model_type: llama, hidden_size: 4096, ...}     speed only

and its draft, a smaller model with the same tokenizer for speculation, in the same forms: `draft: ../models/my-draft`.

Nothing is downloaded here: whoever loads a profile passes the function that fetches a pinned id, or has it looked up in
the local cache.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from codesign.bundled import draft_path, target_path
from codesign.errors import InputError, shown
from codesign.spec.model import ModelSpec
from codesign.spec.section import Count, Name, Positive, Section, Share, validate
from codesign.spec.yaml import Document, Key

Fetch = Callable[[str, str], Path]  # (id, revision) -> directory

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_COMMIT = r"^[0-9a-f]{40}$"


class HubModel(Section):
    """A model of the Hugging Face hub at one exact commit."""

    id: Annotated[str, Field(pattern=rf"^{_HUB_ID.pattern}$")]
    revision: Annotated[str, Field(pattern=_COMMIT)]


class RopeScaling(Section):
    """The `rope_scaling` of a Hugging Face config.json."""

    rope_type: Literal["default", "linear", "llama3", "yarn"]
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None


class Architecture(Section):
    """The keys of a Hugging Face config.json that shape a dense decoder; weights are random with `seed`.

    What the keys mean together is the engine's to check, in one place for files and for profiles.
    """

    weights: Literal["random"]
    name: Name = "random weights"
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count | None = None
    vocab_size: Count
    max_position_embeddings: Count
    rope_theta: Annotated[float, Field(ge=1, le=1e15)] | None = None
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: Share | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: Count | None = None
    use_sliding_window: bool | None = None


def resolve_model(document: Document, key: Key, *, folder: Path, fetch: Fetch) -> ModelSpec:
    """The model that stands at `key` of a profile.

    Args:
        folder: what relative directories are relative to.
        fetch: turns a pinned hub id into a directory.
    Raises:
        InputError: not one of the four forms, or not on this machine.
    """
    value = document.at(key)
    if isinstance(value, str):
        try:
            return model_from_text(value, folder=folder)
        except InputError as error:
            raise document.error(error.message, key) from None
    if isinstance(value, Mapping) and "weights" in value:
        return _random_model(validate(Architecture, document, key), document, key)
    if isinstance(value, Mapping) and ("id" in value or "revision" in value):
        hub = validate(HubModel, document, key)
        try:
            path = fetch(hub.id, hub.revision)
        except InputError as error:
            raise document.error(error.message, key) from None
        return ModelSpec(name=f"{hub.id}@{hub.revision[:12]}", path=str(path))
    raise document.error(
        "must be bundled, a directory, {id: org/name, revision: 40 hex digits} or an architecture with "
        f"weights: random; got {shown(value)}",
        key,
    )


def model_from_text(text: str, *, folder: Path) -> ModelSpec:
    """`bundled`, or a Hugging Face directory; also what `--model` on a command line takes.

    Raises:
        InputError: neither; the text says what is there.
    """
    if text == "bundled":
        return ModelSpec(name="bundled", path=str(target_path()), draft=bundled_draft())
    try:
        path = (folder / Path(text).expanduser()).resolve()
        is_model = (path / "config.json").is_file()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{shown(text)} is not a usable path: {error}") from None
    if is_model:
        return ModelSpec(name=path.name, path=str(path))
    if is_folder:
        raise InputError(f"{shown(text)} is a directory without config.json; a Hugging Face model directory is needed")
    if _HUB_ID.fullmatch(text):
        raise InputError(
            f"{shown(text)} is no directory here; if a hub id is meant, pin it in the profile: "
            f"model: {{id: {text}, revision: <40 hex digits of the commit>}}"
        )
    raise InputError(f"{shown(text)} is neither `bundled` nor a Hugging Face model directory")


def bundled_draft() -> ModelSpec:
    return ModelSpec(name="bundled, draft", path=str(draft_path()))


def resolve_draft(document: Document, key: Key, *, folder: Path, fetch: Fetch) -> ModelSpec:
    """The draft that stands at `key` of a profile; `bundled` is the bundled model's.

    Raises:
        InputError: as `resolve_model`.
    """
    if document.at(key) == "bundled":
        return bundled_draft()
    return resolve_model(document, key, folder=folder, fetch=fetch)


def cached_snapshot(name: str, revision: str) -> Path:
    """The directory of a hub model in the local cache, where `hf download` puts it.

    Raises:
        InputError: it is not there; the text says how to fetch it.
    """
    cache = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    path = Path(cache).expanduser() / f"models--{name.replace('/', '--')}" / "snapshots" / revision
    if not (path / "config.json").is_file():
        raise InputError(
            f"{name} at {revision[:12]} is not in the local cache; fetch it once with "
            f"`hf download {name} --revision {revision}`"
        )
    return path


def _random_model(shape: Architecture, document: Document, key: Key) -> ModelSpec:
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise document.error(
            f"must divide num_attention_heads ({shape.num_attention_heads}), got {shape.num_key_value_heads}",
            (*key, "num_key_value_heads"),
        )
    if shape.head_dim is None and shape.hidden_size % shape.num_attention_heads:
        raise document.error(
            f"must divide hidden_size ({shape.hidden_size}) when head_dim is left out",
            (*key, "num_attention_heads"),
        )
    given = document.at(key)  # as written: an explicit null (no sliding window) is not an absent key
    architecture = {name: value for name, value in given.items() if name not in ("weights", "name", "seed")}
    return ModelSpec(name=shape.name, architecture=architecture, seed=shape.seed)
