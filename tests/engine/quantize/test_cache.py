"""Packed weights on disk: found again, checked, bounded, never in the way."""

import dataclasses
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from codesign.bundled import target_path
from codesign.engine.build import build_engine
from codesign.engine.caches import cache_folder
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.cache import Entry, WeightCache, file_digest
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.driving import generate, request

CONFIG = EngineConfig(dtype="fp32", max_batch_size=1, max_model_len=64, weights=Choice.of("int4", group_size=32))
TENSORS = {"a": torch.arange(7, dtype=torch.int8), "b": torch.randn(3, 5).bfloat16(), "c": torch.empty(0, 4)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def entries() -> list[Path]:
    return sorted(cache_folder("weights").iterdir())


def put(cache: WeightCache, key: str, *, num_bytes: int = 640) -> None:
    with cache.making(key) as new:
        new.keep({"weight": torch.zeros(num_bytes, dtype=torch.uint8)})


def test_tensors_come_back_bit_for_bit_and_aligned(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    with cache.making("key") as new:
        mapped = new.keep(TENSORS)
        new.keep({"only": torch.ones(2)})

    entry = cache.find("key")

    assert entry is not None
    assert entry.num_layers == 2
    for found in (mapped, entry.layer(0)):
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
            assert found[name].data_ptr() % 64 == 0
            assert found[name].untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    assert torch.equal(entry.layer(1)["only"], torch.ones(2))


def test_what_was_said_while_packing_is_kept(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    with cache.making("key") as new:
        new.keep(TENSORS)
        new.notes.append("layer 0 qkv: damped")

    entry = cache.find("key")

    assert entry is not None
    assert entry.notes == ["layer 0 qkv: damped"]


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    with cache.making("key") as new:
        new.keep(TENSORS)["a"].fill_(9)

    entry = cache.find("key")

    assert entry is not None
    assert torch.equal(entry.layer(0)["a"], TENSORS["a"])


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_second_build_finds_the_weights_and_generates_the_same(method: str) -> None:
    config = dataclasses.replace(CONFIG, weights=Choice.of("int4", group_size=32, method=method))
    first, second = (build_engine(tiny_spec(), config) for _ in range(2))

    assert first.facts()["resolved"]["weight_cache"] == "made"
    assert second.facts()["resolved"]["weight_cache"] == "found"
    assert generate(first, request("one", 10, 20)) == generate(second, request("one", 10, 20))
    assert first.facts()["bytes"] == second.facts()["bytes"]
    assert first.facts()["resolved"]["weight_notes"] == second.facts()["resolved"]["weight_notes"]


def test_a_second_build_takes_a_fraction_of_the_time() -> None:
    spec = ModelSpec(name="bundled", path=str(target_path()))
    config = EngineConfig(max_batch_size=1, max_model_len=64, weights=Choice.of("int4", method="gptq"))
    quantising = [build_engine(spec, config).facts()["phases"]["quantize_s"] for _ in range(2)]

    assert quantising[1] < 0.1 * quantising[0]


def test_what_the_weights_depend_on_makes_entries_of_their_own() -> None:
    for spec in (tiny_spec(), tiny_spec(seed=1), tiny_spec("Qwen2ForCausalLM")):
        for weights in (CONFIG.weights, Choice.of("int4", group_size=32, method="hqq"), Choice.of("int8")):
            build_engine(spec, dataclasses.replace(CONFIG, weights=weights))
    build_engine(tiny_spec(), dataclasses.replace(CONFIG, dtype="bf16"))
    build_engine(tiny_spec(), dataclasses.replace(CONFIG, max_model_len=32))

    assert len(entries()) == 10


@pytest.mark.parametrize("damage", ["flip", "cut", "no index", "garbage index", "wrong index", "no layer"])
def test_a_damaged_entry_is_noticed_and_made_again(damage: str) -> None:
    wanted = generate(build_engine(tiny_spec(), CONFIG), request("one", 10, 20))
    (entry,) = entries()
    layer, index = entry / "layer-001.bin", entry / "index.json"
    if damage == "flip":
        data = bytearray(layer.read_bytes())
        data[100] ^= 1
        layer.write_bytes(data)
    elif damage == "cut":
        os.truncate(layer, 100)
    elif damage == "no layer":
        layer.unlink()
    else:
        index.unlink()
        if damage != "no index":
            index.write_text("\x00{" if damage == "garbage index" else '{"layers": [{"sha256": 3}]}')

    engine = build_engine(tiny_spec(), CONFIG)

    assert engine.facts()["resolved"]["weight_cache"] == "made"
    assert generate(engine, request("one", 10, 20)) == wanted
    assert Entry(entries()[0]).num_layers == 2


def test_entries_not_used_for_longest_go_when_there_are_too_many(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, max_bytes=3600)
    for number in range(4):
        put(cache, f"key{number}")
        os.utime(tmp_path / f"key{number}", (1000 + number, 1000 + number))
    assert cache.find("key0") is not None  # used now

    put(cache, "key4")

    assert {entry.name for entry in tmp_path.iterdir()} == {"key0", "key2", "key3", "key4"}


def test_the_newest_entry_stays_though_it_is_too_large_by_itself(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, max_bytes=100)
    put(cache, "small")

    put(cache, "large", num_bytes=6400)

    assert [entry.name for entry in tmp_path.iterdir()] == ["large"]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)

    with pytest.raises(KeyboardInterrupt), cache.making("key") as new:
        new.keep(TENSORS)
        raise KeyboardInterrupt

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_the_cache_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")

    engine = build_engine(tiny_spec(), CONFIG)

    assert engine.facts()["resolved"]["weight_cache"].startswith("off: ")
    assert len(generate(engine, request("one", 10, 5))["one"]) == 5


def test_a_disk_that_fills_up_costs_the_cache_and_nothing_else(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)

    with cache.making("key") as new:
        new.keep(TENSORS)
        shutil.rmtree(next(tmp_path.iterdir()))  # as good as a full disk: the next file cannot be made
        found = new.keep(TENSORS)

    assert new.problem
    assert torch.equal(found["a"], TENSORS["a"])
    assert cache.find("key") is None


def test_builders_at_the_same_time_leave_one_whole_entry(tmp_path: Path) -> None:
    cache, barrier = WeightCache(tmp_path), threading.Barrier(4)

    def build() -> None:
        barrier.wait()
        for _ in range(10):
            put(cache, "key")

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]
    assert cache.find("key") is not None


def test_digests_follow_the_content(tmp_path: Path) -> None:
    file, memo = tmp_path / "file", tmp_path / "memo"
    file.write_bytes(b"one")
    first = file_digest(file, memo)
    assert file_digest(file, memo) == first

    file.write_bytes(b"two")

    assert file_digest(file, memo) != first
