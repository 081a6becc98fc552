"""none: one output token per sequence and step."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NoSpeculation:
    """The neutral member: nothing is drafted."""
