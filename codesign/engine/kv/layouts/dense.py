"""dense: every slot has room for as many rows as its policy keeps, allocated once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Dense:
    """No block tables, no sharing; on a CPU the fastest to read."""
