"""paged: blocks of 32 rows: sequences take them as they grow, give them back, and share those they begin alike with.

PagedAttention (Kwon et al., SOSP 2023), https://arxiv.org/abs/2309.06180. Memory follows what is there instead of the
longest that could be, so that more sequences run than would fit at full length, and a prefix lies there once.
Cost: at most 31 rows of a sequence are unused, and output tokens find their rows through a table: with a kernel that
reads through it (C on CPUs, Triton on CUDA) about what dense costs, without one a copy of them in every step.

Needs rows that stay where they were written, each encoded by itself: kv.policy full, kv.codec native, int8 or fp8.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Paged:
    """Block tables; what they share is only read."""
