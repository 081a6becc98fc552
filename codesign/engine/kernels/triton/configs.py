"""How a weight kernel cuts its work: a rule, a small set to choose from, and what was measured."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def constants(self):
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "SPLIT_K": self.split_k}

    def options(self):
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}
