"""PrefixCache: what prompts have in common is computed once.

    block 0   key 0 = H(seed, tokens 0..31)      block 1   key 1 = H(key 0, tokens 32..63)      ...

The key of a full block names its tokens and everything before them, so equal keys mean equal rows: the lookup of a
prompt walks its own blocks and nothing else, however many prompts are known. Partial blocks have no key. A block gets
its key when its rows are there, output tokens included, so that the next turn of a conversation finds the last one.
Never found is the last token of a prompt: it must be computed, for its logits.

The seed stands for what else rows depend on: model, weights, number formats, policy. Blocks are those of `BlockPool`,
which decides what is evicted. The scheme is vLLM's (automatic prefix caching), with a cryptographic hash and nothing to
compare, since one made to collide would show one user's context to another.
"""

import hashlib
from array import array

from codesign.engine.block_pool import BlockPool
from codesign.engine.sequence import Sequence
from codesign.engine.step import BLOCK_TOKENS


class PrefixCache:
    """Args:
    seed: of every key; two engines with equal seeds compute equal rows for equal tokens.

    Attributes:
        num_lookups: one for each sequence that was admitted, as are the two that follow; resumed ones do not count.
        prompt_tokens: of all of them.
        hit_tokens: those of them that were found.
        num_probes: blocks that were asked for, over all lookups: what looking up costs.
    """

    def __init__(self, pool: BlockPool, *, seed: bytes) -> None:
        self._pool = pool
        self._root = hashlib.sha256(seed).digest()
        self.num_lookups = self.prompt_tokens = self.hit_tokens = self.num_probes = 0

    def match(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the beginning of what a sequence has to prefill, at most all but its last token."""
        found: list[int] = []
        for key in self._keys(sequence, (sequence.num_prefill - 1) // BLOCK_TOKENS):
            self.num_probes += 1
            block = self._pool.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def count(self, sequence: Sequence, num_blocks: int) -> None:
        """Counts the hit of a sequence that is admitted."""
        if not sequence.num_preemptions:
            self.num_lookups += 1
            self.prompt_tokens += sequence.num_prompt
            self.hit_tokens += num_blocks * BLOCK_TOKENS

    def learn(self, sequence: Sequence) -> None:
        """Gives their keys to the blocks that a sequence has filled since the last time."""
        # Drafts that were kept behind the end of an output have rows, and no tokens.
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // BLOCK_TOKENS
        if num_full > sequence.num_known_blocks:
            keys = self._keys(sequence, num_full)
            for index in range(sequence.num_known_blocks, num_full):
                self._pool.label(sequence.blocks[index], keys[index])
            sequence.num_known_blocks = num_full

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Keys of the first blocks, each computed once in a sequence's life: tokens are only ever appended."""
        keys = sequence.block_keys
        while len(keys) < num_blocks:
            start = len(keys) * BLOCK_TOKENS
            tokens = array("q", sequence.token_ids[start : start + BLOCK_TOKENS])
            keys.append(hashlib.sha256((keys[-1] if keys else self._root) + tokens.tobytes()).digest())
        return keys[:num_blocks]
