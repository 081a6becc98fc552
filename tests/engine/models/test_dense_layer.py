import pytest
import torch
from torch import Tensor

from codesign.engine.models.decoder import DecoderLayer, RMSNorm
from codesign.engine.models.dense_layer import DenseLayer
from codesign.engine.models.rope_scaling import rope_of
from codesign.engine.models.shape import ModelShape, read_shape
from codesign.engine.models.tiny import tiny_config
from codesign.engine.quantize.calibration import LINEARS, Calibration
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.linear import Workspace


def tiny_shape(**changes: object) -> ModelShape:
    return read_shape(tiny_config("Qwen2ForCausalLM", **changes), file=None)


def random_layer(shape: ModelShape, seed: int = 0) -> DenseLayer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * 0.2

    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads = shape.num_heads * shape.head_dim
    rows = {
        "qkv": heads + 2 * shape.num_kv_heads * shape.head_dim,
        "output": hidden,
        "gate_up": 2 * inner,
        "down": hidden,
    }
    columns = {"qkv": hidden, "output": heads, "gate_up": hidden, "down": inner}
    return DenseLayer(
        shape=shape,
        input_norm=normal(hidden) + 1,
        q_norm=None,
        k_norm=None,
        mlp_norm=normal(hidden) + 1,
        weight={name: normal(rows[name], columns[name]) for name in LINEARS},
        bias={name: normal(rows[name]) for name in LINEARS},
    )


def as_layer(dense: DenseLayer) -> DecoderLayer:
    linears = {name: Native().wrap(dense.weight[name], dense.bias[name], workspace=Workspace()) for name in LINEARS}
    norms = {"input_norm": dense.input_norm, "mlp_norm": dense.mlp_norm}
    return DecoderLayer(
        dense.shape,
        q_norm=None,
        k_norm=None,
        **{name: RMSNorm(weight, 1e-6) for name, weight in norms.items()},
        **linears,
    )


def output(dense: DenseLayer) -> Tensor:
    ids = torch.arange(24).view(2, 12)
    embedding = torch.randn(dense.shape.vocab_size, dense.shape.hidden_size, generator=torch.Generator().manual_seed(5))
    calibration = Calibration(dense.shape, ids, embedding, rope_of(dense.shape.rope, dense.shape.head_dim))
    hidden = calibration.hidden.flatten(0, 1)
    found: Tensor = as_layer(dense)(hidden, 0, calibration.attention, calibration.batch)
    return found


@pytest.mark.parametrize("name", LINEARS)
def test_a_scale_between_two_weights_leaves_the_function_as_it_was(name: str) -> None:
    dense = random_layer(tiny_shape(num_key_value_heads=4))
    before = output(dense)
    scale = torch.logspace(-1, 1, dense.weight[name].shape[1])[torch.randperm(dense.weight[name].shape[1])]
    kept = dense.weight[name].clone()

    assert dense.can_absorb(name)
    dense.absorb(name, scale)

    torch.testing.assert_close(dense.weight[name], kept * scale)
    torch.testing.assert_close(output(dense), before, rtol=1e-5, atol=1e-4)


def test_grouped_queries_leave_no_scale_before_the_output_projection() -> None:
    dense = random_layer(tiny_shape())

    assert not dense.can_absorb("output")
    assert all(dense.can_absorb(name) for name in ("qkv", "gate_up", "down"))
