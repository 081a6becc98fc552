"""The weights, texts and lists that ship with the package."""

import json
import math
import struct
from pathlib import Path

import pytest

from codesign.bundled import DATA, calibration_texts, draft_path, heldout_texts, target_path
from codesign.bundled.corpus import MAX_OVERLAP, overlap, read_entries, shingles

FOLDERS = [target_path(), draft_path()]


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape, from the safetensors header alone."""
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    assert all(entry["dtype"] == "BF16" for name, entry in header.items() if name != "__metadata__")
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def num_parameters(folder: Path) -> int:
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values())


def test_both_models_together_stay_under_20_mib() -> None:
    num_bytes = sum(file.stat().st_size for folder in FOLDERS for file in folder.iterdir())

    assert num_bytes <= 20 * 2**20


def test_shipped_texts_stay_under_a_megabyte_and_a_half() -> None:
    assert sum(file.stat().st_size for file in DATA.iterdir()) <= 1.5e6


def test_target_has_six_to_nine_million_parameters() -> None:
    assert 6e6 <= num_parameters(target_path()) <= 9e6


def test_draft_is_at_most_an_eighth_of_the_target() -> None:
    assert num_parameters(draft_path()) * 8 <= num_parameters(target_path())


def test_target_shape_exercises_grouped_queries() -> None:
    config = json.loads((target_path() / "config.json").read_text())

    assert config["num_hidden_layers"] >= 6
    assert config["head_dim"] == 64
    assert config["num_key_value_heads"] >= 2
    assert config["num_attention_heads"] >= 2 * config["num_key_value_heads"]
    assert config["max_position_embeddings"] >= 2048


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_config_agrees_with_the_weights(folder: Path) -> None:
    config, shapes = json.loads((folder / "config.json").read_text()), tensor_shapes(folder)

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert shapes["model.embed_tokens.weight"] == [config["vocab_size"], config["hidden_size"]]
    assert ("lm_head.weight" in shapes) is not config["tie_word_embeddings"]
    last = f"model.layers.{config['num_hidden_layers'] - 1}"
    assert shapes[f"{last}.self_attn.k_proj.weight"] == [
        config["num_key_value_heads"] * config["head_dim"],
        config["hidden_size"],
    ]
    assert f"model.layers.{config['num_hidden_layers']}.mlp.up_proj.weight" not in shapes


def test_every_listed_file_is_in_one_split() -> None:
    names = [entry.name for entry in read_entries()]

    assert len(names) == len(set(names))
    assert {entry.split.split(":")[0] for entry in read_entries()} == {"train", "calibration", "heldout", "dropped"}


def test_shipped_texts_are_those_of_the_list() -> None:
    listed = {
        split: {entry.name for entry in read_entries() if entry.split == split} for split in ("heldout", "calibration")
    }

    assert {document.name for document in heldout_texts()} == listed["heldout"]
    assert {document.name for document in calibration_texts()} == listed["calibration"]


def test_calibration_texts_do_not_resemble_heldout_texts() -> None:
    heldout = [shingles(document.text) for document in heldout_texts()]

    for own in [shingles(document.text) for document in calibration_texts()]:
        assert max(overlap(own, other) for other in heldout) <= MAX_OVERLAP


def test_notice_of_the_python_software_foundation_ships_with_its_texts() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (DATA / "LICENSE-PSF.txt").read_text()
