"""Sensitivity: what rounding one linear layer by itself costs, in KL to the unmodified model on calibration text.

    for each layer, linear and format:  KL(model || model with just this weight rounded to nearest), nats per token

The hidden states at each layer's input are computed once, so a candidate only runs the layers from its own on. Whatever
method will pack the weights later, layers are compared by rounding to nearest: what matters is their order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from codesign.engine.models.decoder import Decoder
from codesign.engine.quantize.calibration import LINEARS, Calibration
from codesign.engine.quantize.format import GridFormat
from codesign.engine.quantize.linear import Linear, Workspace, weight_bytes

NUM_SEQUENCES, NUM_TOKENS = 8, 256
Losses = dict[tuple[int, str], dict[str, tuple[int, float]]]


@dataclass(frozen=True)
class Sensitivity:
    """Attributes:
    losses: (layer, linear) -> format name -> (bytes of the weight, KL in nats per token).
    num_weights: of all those linears.
    """

    losses: Losses
    num_weights: int

    def to_json(self) -> dict[str, object]:
        losses = [[layer, name, own] for (layer, name), own in self.losses.items()]
        return {"losses": losses, "num_weights": self.num_weights}

    @classmethod
    def from_json(cls, plain: Mapping[str, object]) -> "Sensitivity":
        """Raises KeyError, TypeError or ValueError for anything that `to_json` did not write."""
        rows = plain["losses"]
        if not isinstance(rows, list):
            raise TypeError("losses must be a list")
        losses: Losses = {}
        for layer, name, own in rows:
            losses[int(layer), str(name)] = {str(key): (int(size), float(loss)) for key, (size, loss) in own.items()}
        return cls(losses, int(str(plain["num_weights"])))


@torch.no_grad()
def measure(
    decoder: Decoder,
    calibration: Calibration,
    candidates: Mapping[str, GridFormat],
    *,
    dtype: torch.dtype,
    on_progress: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Args:
    decoder: with dense weights; left as it was.
    calibration: on a few sequences; its hidden states are used up.
    """
    states = [calibration.hidden.clone()]
    layers = decoder.layer_list
    for layer in layers:
        states.append(calibration.run(layer, states[-1]))
    reference = _log_probabilities(decoder, states[-1])
    losses: Losses = {}
    num_weights = 0
    for index, layer in enumerate(layers):
        for name in LINEARS:
            dense: Linear = getattr(layer, name)
            weight, bias = dense.dequantize(), getattr(dense, "bias", None)
            num_weights += weight.numel()
            own = losses[index, name] = {}
            for format_name, member in candidates.items():
                try:
                    packed = member.pack(weight, bias, dtype=dtype, workspace=Workspace())
                except ValueError:  # a size that this format cannot hold
                    continue
                setattr(layer, name, packed)
                hidden = states[index]
                for later in layers[index:]:
                    hidden = calibration.run(later, hidden)
                own[format_name] = (weight_bytes(packed), _kl(reference, _log_probabilities(decoder, hidden)))
                on_progress()
            setattr(layer, name, dense)
            if not own:
                raise ValueError(f"no format of {', '.join(candidates)} holds layer {index} {name}")
    return Sensitivity(losses, num_weights)


def _log_probabilities(decoder: Decoder, hidden: Tensor) -> Tensor:
    logits: Tensor = decoder.head(decoder.norm(hidden.flatten(0, 1)))
    return logits.float().log_softmax(-1)


def _kl(reference: Tensor, ours: Tensor) -> float:
    return float((reference.exp() * (reference - ours)).sum(-1).mean())
