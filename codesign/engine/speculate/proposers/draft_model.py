"""draft_model: a small model proposes, the target verifies all of it in one step.

    draft    x1 -> x2 -> x3 -> x4          4 small steps
    target   [newest x1 x2 x3 x4]          1 step, 5 rows of logits: it reads its weights once for up to 5 tokens

Pays where a step of the target is bound by reading weights (small batches) and the draft is right often enough:
E[tokens per step] = (1 - a^(K + 1)) / (1 - a) at a per-token acceptance of a. Exact whatever the draft is (`exact.py`).

Leviathan et al., ICML 2023, https://arxiv.org/abs/2211.17192.
Cost: the draft's weights and its cache, which keeps every token of every slot in native precision.
"""

import dataclasses

from codesign.engine.models.assemble import PackClock
from codesign.engine.models.describe import describe
from codesign.engine.models.tokenizer import same_vocabulary
from codesign.engine.speculate.draft_proposer import DraftProposer
from codesign.engine.speculate.proposer import Target, check_adaptive, check_num_draft_tokens
from codesign.engine.weights import build_decoder
from codesign.errors import Unsupported
from codesign.registry import WEIGHT_FORMATS
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftModel:
    """Args:
    num_draft_tokens: most tokens that one step verifies per sequence.
    draft: directory of the draft, relative to the working directory; absent: the one that the model names.
    draft_weights: weight format of the draft, with its default knobs.
    adaptive: choose how many from 0 to num_draft_tokens by measured acceptance and step costs; false: always all. How
        many are drafted decides which random numbers a request uses: drawn output keeps its law, and with `true` the
        same seed gives the same tokens only while the same number is drafted.
    """

    num_draft_tokens: int = 4
    draft: str | None = None
    draft_weights: str = "native"
    adaptive: bool = True

    def __post_init__(self) -> None:
        check_num_draft_tokens(self.num_draft_tokens)
        check_adaptive(self.adaptive)
        if self.draft is not None and not (isinstance(self.draft, str) and self.draft):
            raise ValueError(f"draft must be the directory of a model, got {self.draft!r}")
        if self.draft_weights not in WEIGHT_FORMATS.names():
            raise ValueError(
                f"draft_weights must be a weight format ({', '.join(WEIGHT_FORMATS.names())}), "
                f"got {self.draft_weights!r}"
            )

    def start(self, target: Target) -> DraftProposer:
        model = target.model.draft if self.draft is None else ModelSpec(name=self.draft, path=self.draft)
        assert model is not None, "spec.rules.undrafted"
        shape, _ = describe(model)
        if shape.vocab_size != target.shape.vocab_size:
            raise Unsupported(
                f"speculate draft_model: draft {model.name!r} has a vocabulary of {shape.vocab_size} tokens, model "
                f"{target.model.name!r} one of {target.shape.vocab_size}; a draft must have its target's tokenizer"
            )
        if (
            model.path is not None
            and target.model.path is not None
            and not same_vocabulary(model.path, target.model.path)
        ):
            raise Unsupported(
                f"speculate draft_model: the tokenizers of draft {model.name!r} and model {target.model.name!r} give "
                "the same ids to different tokens; a draft must have its target's tokenizer"
            )
        length = target.config.max_model_len
        if length > min(shape.max_positions, shape.sliding_window or length):
            raise Unsupported(
                f"speculate draft_model: max_model_len {length} is longer than the "
                f"{min(shape.max_positions, shape.sliding_window or length)} positions that draft {model.name!r} sees"
            )
        config = EngineConfig(dtype=target.config.dtype, weights=Choice(self.draft_weights)).resolve()
        clock = PackClock()
        try:
            decoder = build_decoder(
                model,
                shape,
                config,
                dtype=target.dtype,
                device=target.device,
                workspace=target.workspace,
                clock=clock,
            )
        except Unsupported as error:
            raise Unsupported(f"speculate draft_model: draft {model.name!r}: {error}") from error
        target.clock.quantize_s += clock.quantize_s
        target.clock.notes += [f"draft {note}" for note in clock.notes]
        decoder.use(target.pieces)
        return DraftProposer(decoder, shape, target)
