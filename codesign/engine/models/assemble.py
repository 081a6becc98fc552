"""From named dense tensors to a Decoder, one layer at a time, so that building never holds much more than the result.

Names are those of Hugging Face checkpoints. The embedding table and the head stay in the model's dtype whatever the
weight format is: the table is only looked up, and the head decides the token.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from codesign.engine.memory import return_freed_memory
from codesign.engine.models.decoder import Decoder, DecoderLayer, RMSNorm
from codesign.engine.models.dense_layer import DenseLayer
from codesign.engine.models.imported import ImportedCheckpoint
from codesign.engine.models.shape import ModelShape
from codesign.engine.prune.pruner import Pruner
from codesign.engine.prune.pruners.none import NoPruning
from codesign.engine.quantize.cache import WeightCache
from codesign.engine.quantize.calibration import LINEARS, Calibration
from codesign.engine.quantize.format import GridFormat, WeightFormat
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.quantize.packed_linear import PackedFormat, PackedLinear
from codesign.engine.quantize.shadow import ShadowedLinear
from codesign.errors import Unsupported

Shapes = Mapping[str, tuple[int, ...]]

NORM_NAMES = {
    "input_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
}
LINEAR_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class TensorSource(Protocol):
    """Where dense weights come from: a checkpoint on disk, or random numbers."""

    def read(self, shapes: Shapes) -> dict[str, Tensor]:
        """These tensors on the CPU, in any float dtype, each of exactly the shape asked for; finite.

        Raises:
            CodesignError: a tensor that is missing, of another shape or type, or not finite.
        """

    def finish(self, expected: Shapes) -> None:
        """Called last with everything that the model has; raises when the source holds more than the model uses."""


@dataclasses.dataclass(kw_only=True)
class PackClock:
    """Seconds spent packing weights, as opposed to reading them; whether the cache had them ("found", "made", "");
    what went otherwise than asked, linear by linear."""

    quantize_s: float = 0.0
    cache: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembler:
    """How dense tensors become layers.

    Args:
        weight_format: packs every linear layer of the decoder layers.
        pruner: puts zeros into them before.
        cache, cache_key: where packed layers are kept between builds, and the name of everything they depend on.
        calibrate: embedding table -> text to run through the model, for methods that want to see inputs.
    """

    shape: ModelShape
    weight_format: WeightFormat
    pruner: Pruner = dataclasses.field(default_factory=NoPruning)
    dtype: torch.dtype
    device: torch.device
    workspace: Workspace
    calibrate: Callable[[Tensor], Calibration] | None = None
    cache: WeightCache | None = None
    cache_key: str = ""
    clock: PackClock = dataclasses.field(default_factory=PackClock)

    def build(self, source: TensorSource) -> Decoder:
        """The whole model. Raises what `source` raises, and Unsupported for shapes that the format cannot hold."""
        layers = self.build_layers(source)
        tensors = source.read(outer_shapes(self.shape))
        embedding = self.own(tensors["model.embed_tokens.weight"])
        if self.shape.ties_embeddings:
            head = Native().wrap(embedding, None, workspace=self.workspace)
        else:
            head = self.pack(Native(), "lm_head", self.own(tensors["lm_head.weight"]), None)
        source.finish(dict(all_shapes(self.shape)))
        return Decoder(
            self.shape, embedding=embedding, layers=layers, norm=self.norm(tensors["model.norm.weight"]), head=head
        ).requires_grad_(False)

    def build_layers(self, source: TensorSource) -> list[DecoderLayer]:
        """All layers of `shape`; raises as `build` does."""
        return [self._shadowed(layer) for layer in self._layers(source)]

    def _layers(self, source: TensorSource) -> Iterator[DecoderLayer]:
        """Out of the cache, or packed now and put there where one is given."""
        if self.cache is None:
            yield from self._new_layers(source)
            return
        entry = self.cache.find(self.cache_key)
        if entry is not None and entry.num_layers == self.shape.num_layers:
            self.clock.cache = "found"
            self.clock.notes += entry.notes
            yield from (self._restored(index, entry.layer(index)) for index in range(entry.num_layers))
            return
        self.clock.cache = "made"
        with self.cache.making(self.cache_key) as new:
            layers = self._new_layers(source)
            for index in range(self.shape.num_layers):
                # No name holds the packed layer while the next one is packed: it is on disk now.
                yield self._restored(index, new.keep(dict(next(layers).named_buffers())))
            new.notes += self.clock.notes
        if new.problem:
            self.clock.cache = f"off: {new.problem}"

    def _shadowed(self, layer: DecoderLayer) -> DecoderLayer:
        """The layer with dense copies beside its packed weights, where the format asks for them."""
        if not isinstance(self.weight_format, PackedFormat) or not self.weight_format.shadow:
            return layer
        for name in LINEARS:
            packed: PackedLinear = getattr(layer, name)
            try:
                setattr(layer, name, ShadowedLinear(packed, dtype=self.dtype, workspace=self.workspace))
            except ValueError as error:
                raise Unsupported(f"weights.shadow: {error}") from error
        return layer

    def _new_layers(self, source: TensorSource) -> Iterator[DecoderLayer]:
        calibration = self._calibration(source)
        for index in range(self.shape.num_layers):
            yield self._layer(index, source, calibration)

    def _restored(self, index: int, tensors: Mapping[str, Tensor]) -> DecoderLayer:
        """A layer from the buffers of an earlier one, on pages of their file."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, buffer = name.partition(".")
            parts.setdefault(part, {})[buffer] = tensor.to(self.device)
        linears = {}
        for name in LINEARS:
            own = self.weight_format.of(index, name)
            assert isinstance(own, GridFormat), "only packed weights are kept"
            linears[name] = own.restore(parts[name], dtype=self.dtype, workspace=self.workspace)
        eps = self.shape.rms_norm_eps
        norms = {name: RMSNorm(parts[name]["weight"], eps) if name in parts else None for name in NORM_NAMES}
        return DecoderLayer(self.shape, **norms, **linears)  # type: ignore[arg-type]

    def _calibration(self, source: TensorSource) -> Calibration | None:
        """Where the method wants to see inputs: calibration text, looked up in the embedding."""
        method = self.weight_format.method_member
        if not self.pruner.needs_inputs and not (method is not None and method.needs_inputs):
            return None
        name = "model.embed_tokens.weight"
        embedding = source.read({name: outer_shapes(self.shape)[name]})[name].to(self.dtype)
        assert self.calibrate is not None, "a method that needs inputs needs something to calibrate on"
        return self.calibrate(embedding)

    def _read_parts(self, source: TensorSource, index: int, kind: str, parts: tuple[str, ...]) -> Tensor | None:
        """The parts on top of each other as one new tensor, in the source's precision: a format packs what the
        checkpoint says. None where the model has no such tensor."""
        shapes = layer_shapes(self.shape, index)
        names = [f"model.layers.{index}.{part}.{kind}" for part in parts]
        if names[0] not in shapes:
            return None
        found = source.read({name: shapes[name] for name in names})
        return torch.cat([found[name].to(self.device) for name in names])

    def _read_layer(self, index: int, source: TensorSource) -> DenseLayer:
        def optional(kind: str, *parts: str) -> Tensor | None:
            return self._read_parts(source, index, kind, parts)

        def weight(*parts: str) -> Tensor:
            found = optional("weight", *parts)
            assert found is not None, "every linear layer has a weight"
            return found

        return DenseLayer(
            shape=self.shape,
            input_norm=weight(NORM_NAMES["input_norm"]),
            q_norm=optional("weight", NORM_NAMES["q_norm"]),
            k_norm=optional("weight", NORM_NAMES["k_norm"]),
            mlp_norm=weight(NORM_NAMES["mlp_norm"]),
            weight={name: weight(*LINEAR_PARTS[name]) for name in LINEARS},
            bias={name: optional("bias", *LINEAR_PARTS[name]) for name in LINEARS},
        )

    def _layer(self, index: int, source: TensorSource, calibration: Calibration | None) -> DecoderLayer:
        if isinstance(source, ImportedCheckpoint):
            return self._imported_layer(index, source)
        dense = self._read_layer(index, source)
        if calibration is None:
            return self._decoder_layer(dense, lambda name: self._pack_linear(index, name, dense))
        native = Native()

        def wrapped() -> DecoderLayer:
            return self._decoder_layer(
                dense,
                lambda name: native.wrap(dense.weight[name].to(self.dtype), dense.bias[name], workspace=self.workspace),
            )

        started, packed_before = time.perf_counter(), self.clock.quantize_s
        own = {name: self.weight_format.of(index, name) for name in LINEARS}
        grids = {name: member.grid(self.dtype) for name, member in own.items() if isinstance(member, GridFormat)}
        if self.weight_format.method_member is not None:
            self.weight_format.method_member.fold(dense, wrapped(), calibration, grids)
        layer = wrapped()
        calibration.pack(layer, lambda name, inputs: self._pack_linear(index, name, dense, inputs), keeps_hessian=True)
        self.clock.quantize_s = packed_before + time.perf_counter() - started
        return layer

    def _imported_layer(self, index: int, source: ImportedCheckpoint) -> DecoderLayer:
        """Packed as the checkpoint holds it; what it holds dense stays dense."""
        prefix, shapes = f"model.layers.{index}.", layer_shapes(self.shape, index)
        linears: dict[str, Linear] = {}
        for name in LINEARS:
            names = [f"{prefix}{part}.weight" for part in LINEAR_PARTS[name]]
            weights = {key: shapes[key] for key in names}
            packed = [source.is_packed(key) for key in weights]
            bias = self._read_parts(source, index, "bias", LINEAR_PARTS[name])
            if all(packed):
                linears[name] = source.read_linear(weights, bias, dtype=self.dtype, workspace=self.workspace)
            elif any(packed):
                raise Unsupported(f"{source.path}: layer {index} {name}: one part is quantised and another is not")
            else:
                weight = self._read_parts(source, index, "weight", LINEAR_PARTS[name])
                assert weight is not None, "every linear layer has a weight"
                linears[name] = self.pack(Native(), f"layer {index} {name}", weight, bias)
        norms = {
            own: None if (weight := self._read_parts(source, index, "weight", (name,))) is None else self.norm(weight)
            for own, name in NORM_NAMES.items()
        }
        return DecoderLayer(self.shape, **norms, **linears)  # type: ignore[arg-type]

    def _decoder_layer(self, dense: DenseLayer, linear: Callable[[str], Linear]) -> DecoderLayer:
        linears = {name: linear(name) for name in LINEARS}
        return DecoderLayer(
            self.shape,
            input_norm=self.norm(dense.input_norm),
            q_norm=None if dense.q_norm is None else self.norm(dense.q_norm),
            k_norm=None if dense.k_norm is None else self.norm(dense.k_norm),
            mlp_norm=self.norm(dense.mlp_norm),
            **linears,
        )

    def _pack_linear(self, index: int, name: str, dense: DenseLayer, inputs: InputStats | None = None) -> Linear:
        """Packs one linear and lets go of its dense weight."""
        weight, bias = self.pruner.prune(dense.weight.pop(name), inputs), dense.bias.pop(name)
        num_queries_and_keys = (self.shape.num_heads + self.shape.num_kv_heads) * self.shape.head_dim
        return self.pack(
            self.weight_format.of(index, name),
            f"layer {index} {name}",
            weight,
            bias,
            inputs=inputs,
            num_unclipped_rows=num_queries_and_keys if name == "qkv" else 0,
        )

    def pack(
        self,
        weight_format: WeightFormat,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        *,
        inputs: InputStats | None = None,
        num_unclipped_rows: int = 0,
    ) -> Linear:
        started = time.perf_counter()
        try:
            packed = weight_format.pack(
                weight,
                bias,
                dtype=self.dtype,
                workspace=self.workspace,
                inputs=inputs,
                num_unclipped_rows=num_unclipped_rows,
            )
            if packed.note:
                self.clock.notes.append(f"{name}: {packed.note}")
            return packed
        except ValueError as error:
            chosen = type(weight_format).__name__.lower()
            raise Unsupported(f"weight format {chosen!r} cannot hold {name} {list(weight.shape)}: {error}") from error
        finally:
            return_freed_memory()
            self.clock.quantize_s += time.perf_counter() - started

    def norm(self, weight: Tensor) -> RMSNorm:
        return RMSNorm(self.own(weight), self.shape.rms_norm_eps)

    def own(self, tensor: Tensor) -> Tensor:
        """On the device, in the model's dtype; always a copy, because a checkpoint's tensor is its mapped file, and one
        that is kept would keep all pages of the file in memory."""
        return tensor.to(self.device, self.dtype, copy=True)


def layer_shapes(shape: ModelShape, index: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of one layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    linears = {
        "self_attn.q_proj": (q_size, hidden, shape.has_qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, shape.has_qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, shape.has_qkv_bias),
        "self_attn.o_proj": (hidden, q_size, shape.has_output_bias),
        "mlp.gate_proj": (inner, hidden, shape.has_mlp_bias),
        "mlp.up_proj": (inner, hidden, shape.has_mlp_bias),
        "mlp.down_proj": (hidden, inner, shape.has_mlp_bias),
    }
    found: dict[str, tuple[int, ...]] = {}
    for name, (num_out, num_in, has_bias) in linears.items():
        found[f"{name}.weight"] = (num_out, num_in)
        if has_bias:
            found[f"{name}.bias"] = (num_out,)
    found["input_layernorm.weight"] = found["post_attention_layernorm.weight"] = (hidden,)
    if shape.has_qk_norm:
        found["self_attn.q_norm.weight"] = found["self_attn.k_norm.weight"] = (shape.head_dim,)
    return {f"model.layers.{index}.{name}": size for name, size in found.items()}


def outer_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is not in a layer."""
    table = (shape.vocab_size, shape.hidden_size)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": (shape.hidden_size,)}
    if not shape.ties_embeddings:
        found["lm_head.weight"] = table
    return found


def all_shapes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from outer_shapes(shape).items()
    for index in range(shape.num_layers):
        yield from layer_shapes(shape, index).items()
