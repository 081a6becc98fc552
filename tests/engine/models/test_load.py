"""What a checkpoint directory may do to us, and what it may not."""

import json
import math
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from codesign.engine.memory import return_freed_memory
from codesign.engine.models.assemble import all_shapes, layer_shapes
from codesign.engine.models.decoder import Decoder
from codesign.engine.models.load import Checkpoint, read_config
from codesign.engine.models.random import RandomWeights
from codesign.engine.models.shape import read_shape
from codesign.engine.models.tiny import tiny_config
from codesign.errors import CodesignError, InputError, Unsupported
from tests.engine.models.test_logits import load_decoder
from tests.engine.models.transformers_peer import peer, save

FP32 = torch.float32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(peer("LlamaForCausalLM"), tmp_path)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors by name ('.' written as '__'), or drops them."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


def same(first: Decoder, second: Decoder) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_sharded_checkpoint_loads_the_same_model(folder: Path, tmp_path: Path) -> None:
    sharded = save(peer("LlamaForCausalLM"), tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2

    assert same(load_decoder(sharded), load_decoder(folder))


def test_weights_bytes_are_those_of_the_numbers(folder: Path, tmp_path: Path) -> None:
    tied = save(peer("LlamaForCausalLM", tie_word_embeddings=True), tmp_path / "tied")

    for where, dtype, size in ((folder, FP32, 4), (folder, torch.bfloat16, 2), (tied, FP32, 4), (tied, torch.half, 2)):
        model = load_decoder(where, dtype)
        # a kernel library may pad what it packs by about a KiB per layer
        assert 0 <= model.num_bytes - model.shape.num_parameters * size <= 32 * 1024


def test_model_keeps_no_page_of_the_file(folder: Path) -> None:
    """A tensor that is a view of the mapped file would keep all of the file resident."""
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        kept = handle.get_tensor("model.norm.weight")
        assert str(folder) in Path("/proc/self/maps").read_text()
    del kept, handle

    model = load_decoder(folder)

    assert model.num_bytes > 0
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_building_holds_at_most_two_layers_more_than_the_result(tmp_path: Path) -> None:
    plain = tiny_config(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, head_dim=64
    )
    shape = read_shape(plain)
    tensors = RandomWeights(shape, seed=0, dtype=FP32).read(dict(all_shapes(shape)))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(plain))
    del tensors
    return_freed_memory()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

    model = load_decoder(tmp_path)

    layer_bytes = sum(math.prod(size) for size in layer_shapes(shape, 0).values()) * 4
    assert model.num_bytes > 11 * layer_bytes
    assert resident_bytes("VmHWM") - before <= model.num_bytes + 2 * layer_bytes


def resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def test_tied_checkpoint_may_carry_the_head_again(tmp_path: Path) -> None:
    folder = save(peer("LlamaForCausalLM", tie_word_embeddings=True), tmp_path)
    expected = load_decoder(folder)

    rewrite(
        folder, lm_head__weight=torch.zeros(128, 64), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)
    )

    assert same(load_decoder(folder), expected)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_never_opened(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    (folder / name).chmod(0)

    with pytest.raises(Unsupported, match="pickled weights"):
        Checkpoint(folder, dtype=FP32)
    assert not marker.exists()


def test_pickle_named_safetensors_does_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(marker)))

    with pytest.raises(InputError, match="safetensors"):
        load_decoder(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "pytorch_model.bin", "", "..", 7, None, ["a"]]
)
def test_index_cannot_name_files_elsewhere_or_of_another_kind(shard: object, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    with safe_open(folder.parent / "x.safetensors", framework="pt") as handle:
        index = {"weight_map": dict.fromkeys(handle.keys(), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(InputError, match="weight_map"):
        load_decoder(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}, []])
def test_malformed_index_is_an_input_error(index: object, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(InputError, match=r"index\.json"):
        load_decoder(folder)


def test_index_that_promises_what_the_shard_lacks_names_both(folder: Path) -> None:
    sharded = save(peer("LlamaForCausalLM"), folder / "sharded", max_shard_size="100KB")
    index = sharded / "model.safetensors.index.json"
    plain = json.loads(index.read_text())
    shards = sorted(set(plain["weight_map"].values()))
    name = next(name for name, shard in plain["weight_map"].items() if shard == shards[0])
    plain["weight_map"][name] = shards[1]
    index.write_text(json.dumps(plain))

    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_decoder(sharded)

    (sharded / shards[1]).unlink()
    with pytest.raises(InputError, match=shards[1]):
        load_decoder(sharded)


def test_truncated_file_is_an_input_error_at_any_cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for cut in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            load_decoder(folder)


def test_header_lies_are_input_errors(folder: Path) -> None:
    file = folder / "model.safetensors"
    headers = [
        b"\xff" * 100,
        json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 2**60]}}).encode(),
        json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode(),
        b"[" * 10000,
    ]
    for header in headers:
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(InputError, match=r"model\.safetensors"):
            load_decoder(folder)
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_decoder(folder)


def test_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, model__layers__1__mlp__up_proj__weight=None)

    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_decoder(folder)


@pytest.mark.parametrize(
    "extra", ["model__layers__2__mlp__up_proj__weight", "model__layers__0__self_attn__q_proj__bias"]
)
def test_tensor_that_the_config_does_not_know_is_refused(extra: str, folder: Path) -> None:
    rewrite(folder, **{extra: torch.zeros(64)})

    with pytest.raises(InputError, match="does not have"):
        load_decoder(folder)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (128, 63), (64, 128), (8192,)])
def test_wrong_shape_names_both(shape: tuple[int, ...], folder: Path) -> None:
    rewrite(folder, model__embed_tokens__weight=torch.zeros(shape))

    with pytest.raises(InputError, match=r"embed_tokens.*shape.*asks for \[128, 64\]"):
        load_decoder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, folder: Path) -> None:
    weight = torch.ones(64, dtype=dtype)
    weight[17] = value
    rewrite(folder, model__norm__weight=weight)

    with pytest.raises(InputError, match=r"model\.norm\.weight.*not finite"):
        load_decoder(folder)


def test_large_finite_values_load_although_their_sum_overflows(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.full((64,), 3e38))

    assert load_decoder(folder).norm.weight.max() == torch.tensor(3e38)


def test_values_beyond_fp16_are_refused_for_fp16_only(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.full((64,), 1e5))

    load_decoder(folder, torch.bfloat16)
    with pytest.raises(Unsupported, match=r"model\.norm\.weight.*fp16"):
        load_decoder(folder, torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_not_floats_are_refused_by_name(dtype: torch.dtype, folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(64).to(dtype))

    with pytest.raises(Unsupported, match=r"model\.norm\.weight.*supported: F64, F32, F16, BF16"):
        load_decoder(folder)


CONFIG_BYTES = {
    "empty": b"",
    "not json": b"{",
    "a list": b"[]",
    "binary": bytes(range(256)),
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "nan": b'{"rms_norm_eps": NaN}',
    "long number": b'{"vocab_size": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("case", CONFIG_BYTES)
def test_hostile_config_json_is_an_input_error(case: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(CONFIG_BYTES[case])

    with pytest.raises(InputError, match=r"config\.json"):
        load_decoder(folder)


def test_directory_without_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path, dtype=FP32)
    with pytest.raises(CodesignError, match="not a directory"):
        Checkpoint(tmp_path / "config.json", dtype=FP32)
