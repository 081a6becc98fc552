"""Choice: one sequence on its way to a client, from tokens to text, until a stop string or the engine ends it."""

import dataclasses

from codesign.engine.models.tokenizer import Tokenizer
from codesign.engine.sequence import StepOutput
from codesign.serve.detokenize import Detokenizer
from codesign.serve.stops import StopMatcher


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A token with its log probability under the model's own law (natural logarithm).

    Attributes:
        offset: where its text begins in the output, in characters.
        likeliest: (text, log probability), best first.
    """

    text: str
    logprob: float
    offset: int
    likeliest: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one token brought.

    Attributes:
        token_id: the token.
        text: settled by it, often empty.
        finish_reason: "stop" or "length" when it was the last.
        score: None when not asked for.
    """

    token_id: int
    text: str
    finish_reason: str = ""
    score: TokenScore | None = None


class Choice:
    """Args:
    prompt_token_ids: what the output continues.
    stops: texts that end the output and are not part of it.

    Attributes:
        num_tokens: output tokens so far; the last one counts, be it an end of text or what completed a stop string.
        finish_reason: "" while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: tuple[int, ...], stops: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer.decode, prompt_token_ids)
        self._stops = StopMatcher(stops)
        self._num_chars = 0
        self.num_tokens = 0
        self.finish_reason = ""

    def take(self, output: StepOutput) -> Piece:
        """The next token. An end of text (`finish_reason` "stop") has no text of its own."""
        assert not self.finish_reason, "a choice that ended takes no more tokens"
        self.num_tokens += 1
        offset = self._num_chars
        text = "" if output.finish_reason == "stop" else self._detokenizer.add(output.token_id)
        if output.finish_reason:
            text += self._detokenizer.finish()
        self._num_chars += len(text)
        text = self._stops.add(text)
        if self._stops.is_stopped:
            self.finish_reason = "stop"
        elif output.finish_reason:
            self.finish_reason = output.finish_reason
            text += self._stops.finish()
        return Piece(output.token_id, text, self.finish_reason, self._score(output, offset))

    def _score(self, output: StepOutput, offset: int) -> TokenScore | None:
        if not output.logprobs:
            return None
        (chosen, logprob), *others = output.logprobs
        likeliest = tuple((self._tokenizer.decode([token_id]), value) for token_id, value in others)
        return TokenScore(self._tokenizer.decode([chosen]), logprob, offset, likeliest)
