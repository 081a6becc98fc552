"""ngram: what followed the last tokens where they stood before in the same text, prompt or output.

    ... def load_profile(path): | ... see load_      the suffix `load_` was followed by `profile(path)`

Costs no model and no memory of the device; pays where output repeats its prompt (summaries, edits, code, retrieval) and
proposes nothing where it does not. The longest suffix wins, and of its occurrences the most recent one.

Prompt lookup (Saxena, 2023), https://github.com/apoorvumang/prompt-lookup-decoding. Departs from it: there the first
occurrence is taken, only with a full continuation, and every window is compared anew at every step; here a hash map
finds the most recent one at a constant price per token, and a continuation may be short or run into itself.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Items

from codesign.engine.sequence import Sequence
from codesign.engine.speculate.exact import Draft
from codesign.engine.speculate.ngram_index import NgramIndex
from codesign.engine.speculate.proposer import Target, check_adaptive, check_num_draft_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ngram:
    """Args:
    num_draft_tokens: most tokens that one step verifies per sequence.
    max_ngram, min_ngram: longest and shortest suffix that is looked for.
    adaptive: choose how many from 0 to num_draft_tokens by measured acceptance and step costs; false: always all
        (drawn output: see draft_model).
    """

    num_draft_tokens: int = 8
    max_ngram: int = 4
    min_ngram: int = 2
    adaptive: bool = True

    def __post_init__(self) -> None:
        check_num_draft_tokens(self.num_draft_tokens)
        check_adaptive(self.adaptive)
        for name in ("max_ngram", "min_ngram"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 16:
                raise ValueError(f"{name} must be a whole number from 1 to 16, got {value!r}")
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} is more than max_ngram {self.max_ngram}")

    def start(self, target: Target) -> "NgramProposer":
        return NgramProposer(self.min_ngram, self.max_ngram)


class NgramProposer:
    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self._sizes = min_ngram, max_ngram
        self._indices: dict[str, tuple[Sequence, NgramIndex]] = {}

    @property
    def slot_bytes(self) -> int:
        return 0

    def allocate(self, num_slots: int) -> None:
        """Nothing is kept per slot."""

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> dict[str, Draft]:
        found = {}
        for sequence, count in wanted:
            owner, index = self._indices.get(sequence.request_id, (None, None))
            if index is None or owner is not sequence:
                index = NgramIndex(*self._sizes)
                self._indices[sequence.request_id] = sequence, index
            token_ids = index.propose(sequence.token_ids, count)
            if token_ids:
                found[sequence.request_id] = Draft(token_ids)
        return found

    def release(self, request_id: str) -> None:
        self._indices.pop(request_id, None)

    def num_bytes(self) -> Mapping[str, int]:
        return {}

    def device_busy_us(self) -> int:
        return 0
