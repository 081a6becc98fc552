"""Method: how codes are chosen for a weight on a grid. Members live in `methods/`; `rtn` needs only the weight."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from codesign.engine.models.decoder import DecoderLayer
from codesign.engine.models.dense_layer import DenseLayer
from codesign.engine.quantize.calibration import Calibration
from codesign.engine.quantize.grid import Grid, Quantized
from codesign.engine.quantize.inputs import InputStats


class Method(ABC):
    """The protocol. Members are frozen dataclasses of knobs.

    Attributes:
        needs_inputs: whether calibration text must be run through the model first.
    """

    needs_inputs: ClassVar[bool] = False

    def fold(  # noqa: B027  # most methods move nothing
        self, dense: DenseLayer, layer: DecoderLayer, calibration: Calibration, grids: Mapping[str, Grid]
    ) -> None:
        """Moves scales between neighbouring weights of `dense` before any of them is packed; does nothing by default.

        Args:
            dense: the layer's tensors, to be changed in place by `absorb`.
            layer: a layer that computes with them as they were.
            grids: name of a linear -> what its weights will be rounded to.
        """

    @abstractmethod
    def quantize(
        self, weight: Tensor, grid: Grid, inputs: InputStats | None, *, num_unclipped_rows: int = 0
    ) -> Quantized:
        """Codes for a finite weight [out, in].

        Args:
            inputs: what the layer sees; None is allowed unless `needs_inputs`.
            num_unclipped_rows: so many rows at the start are queries and keys, whose range must not be clipped.
        Raises:
            ValueError: the weight does not fit the grid.
        """
