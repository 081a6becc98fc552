"""What a model says of itself before a weight is read: its shape, and the tokens that end an output."""

from pathlib import Path

from codesign.engine.models.load import read_config
from codesign.engine.models.shape import ModelShape, read_shape
from codesign.engine.models.tokenizer import eos_token_ids
from codesign.spec.model import ModelSpec


def describe(model: ModelSpec) -> tuple[ModelShape, frozenset[int]]:
    """(shape, ids that end an output; none for random weights).

    Raises:
        InputError, Unsupported: a file or key is wrong, or an architecture that is not here.
    """
    if model.path is None:
        assert model.architecture is not None, "ModelSpec holds a path or an architecture"
        return read_shape(dict(model.architecture), file=None), frozenset()
    path = Path(model.path)
    return read_shape(read_config(path), file=path / "config.json"), eos_token_ids(path)
