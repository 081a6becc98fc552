"""What a client may send, as OpenAI's API names it. A field that is not here, or not done, is refused by name.

Extensions: `top_k` (0 keeps all tokens), `ignore_eos` (go on to `max_tokens`, for loads of fixed length) and
`return_token_ids` (the output's token ids in `choices[].token_ids`, as in vLLM).
A field of OpenAI's that we do not do is taken with the one value that changes nothing, since many clients send it.
"""

from typing import Annotated, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from codesign.errors import nearest
from codesign.serve import bounds
from codesign.serve.refusal import Refusal

Text = Annotated[str, Field(max_length=bounds.BODY_BYTES)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=bounds.PROMPT_TOKENS)]
Prompt = (
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=bounds.PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=bounds.PROMPTS)]
)
StopText = Annotated[str, Field(min_length=1, max_length=bounds.STOP_CHARS)]
Stop = StopText | Annotated[list[StopText], Field(max_length=bounds.STOPS)]
MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Sent(BaseModel):
    """Strict: `"5"` is no number; fields that we do not know are errors."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Sent):
    include_usage: bool | None = None


class GenerationRequest(Sent):
    """What both kinds of request share. OpenAI's defaults: temperature 1, one choice."""

    model: Annotated[str, Field(max_length=256)]
    max_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=bounds.CHOICES)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    user: Annotated[str, Field(max_length=bounds.USER_CHARS)] | None = None  # OpenAI's bookkeeping; of no effect here
    # Not done, taken when they ask for nothing.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def has_usage_at_end(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=bounds.TOP_LOGPROBS)] | None = None
    # Not done, taken when they ask for nothing.
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ContentPart(Sent):
    type: Literal["text"]
    text: Text


class Message(Sent):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(min_length=1, max_length=bounds.MESSAGES)]

    @property
    def plain(self) -> dict[str, str]:
        """For the model's template, which is written for text."""
        content = self.content
        return {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }


class ResponseFormat(Sent):
    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=bounds.MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=bounds.TOP_LOGPROBS)] | None = None
    # Not done, taken when it asks for nothing.
    response_format: ResponseFormat | None = None


_NOT_DONE = {
    "frequency_penalty": "0",
    "presence_penalty": "0",
    "logit_bias": "{}",
    "echo": "false",
    "best_of": "1",
    "suffix": '""',
    "response_format": '{"type": "text"}',
}
_UNIONS = {
    "prompt": f"must be text, a list of 1 to {bounds.PROMPTS} texts, a list of token ids, or a list of 1 to "
    f"{bounds.PROMPTS} such lists",
    "stop": f"must be text of 1 to {bounds.STOP_CHARS} characters, or a list of at most {bounds.STOPS} of them",
}
SentT = TypeVar("SentT", bound=GenerationRequest)


def parse(body: bytes, kind: type[SentT]) -> SentT:
    """The request in a body.

    Raises:
        Refusal: 400, with the field, what is allowed, and the nearest known name.
    """
    try:
        asked = kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _translated(error, kind) from None
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "stream_options: is only allowed with stream: true", param="stream_options")
    if isinstance(asked, ChatRequest):
        if None not in (asked.max_tokens, asked.max_completion_tokens):
            raise Refusal(400, "max_tokens and max_completion_tokens: give one of the two", param="max_tokens")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refusal(400, "top_logprobs: is only allowed with logprobs: true", param="top_logprobs")
    return asked


def _translated(error: pydantic.ValidationError, kind: type[GenerationRequest]) -> Refusal:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    location = first["loc"]
    if not location:
        return Refusal(400, f"the body is not a JSON object that can be read: {first['msg']:.200}")
    field = f"{location[0]:.60}"
    if field in _NOT_DONE:
        message = f"is not supported; leave it out (or {_NOT_DONE[field]}, which asks for nothing)"
    elif field in _UNIONS and first["type"] != "missing":
        message = _UNIONS[field]
    elif first["type"] == "extra_forbidden":
        near = nearest(str(location[-1]), kind.model_fields) if len(location) == 1 else None
        message = "is not supported" + (f"; did you mean {near!r}?" if near else "")
    else:
        message = first["msg"]
    place = (
        field
        if field in _UNIONS
        else ".".join(f"{part:.60}" if isinstance(part, str) else str(part) for part in location)
    )
    return Refusal(400, f"{place}: {message}", param=field)
