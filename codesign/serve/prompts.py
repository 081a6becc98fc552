"""From what a client sent to what the engine is asked: token ids, sampling, seeds."""

import asyncio
import hashlib
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from codesign.engine.engine import check_tokens
from codesign.engine.models.tokenizer import Tokenizer
from codesign.errors import InputError
from codesign.serve import bounds
from codesign.serve.chat_template import ChatTemplate, TemplateFailed
from codesign.serve.refusal import Refusal
from codesign.serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from codesign.spec.request import Request, SamplingParams

_CHARS_PER_TOKEN, _LEAST_CHARS = 16, 4096  # of a beginning that is looked at first
_COMPLETION_TOKENS = 16  # OpenAI's default


class Prompts:
    """Args:
    max_model_len: most tokens of prompt and output together.
    template: of the model; or why there is none.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | str, *, max_model_len: int, vocab_size: int
    ) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._max_model_len, self._vocab_size = max_model_len, vocab_size
        self._encoder = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="template")
        self._rendering = asyncio.Lock()

    async def of_completion(self, asked: CompletionRequest) -> list[Request]:
        """One request per prompt and choice: prompt 0 with its choices, prompt 1 with its, ...

        Raises:
            Refusal: 400, too long or not in the vocabulary.
        """
        num_sequences = len(asked.prompts) * (asked.n or 1)
        if num_sequences > bounds.SEQUENCES:
            raise Refusal(400, f"n: {num_sequences} choices are asked for, {bounds.SEQUENCES} is the most", param="n")
        found = []
        for prompt in asked.prompts:
            token_ids = await self._encoded(prompt, "prompt", whole=True) if isinstance(prompt, str) else prompt
            self._check(token_ids, "prompt")
            max_tokens = asked.max_tokens or _COMPLETION_TOKENS
            found += self._requests(asked, token_ids, max_tokens, asked.logprobs)
        return found

    async def of_chat(self, asked: ChatRequest) -> list[Request]:
        """One request per choice. Without a bound of the client's an answer may take what the model has room for.

        Raises:
            Refusal: 400, too long, or the model's template cannot say it; 429 when the template is busy.
        """
        text = await self._rendered([message.plain for message in asked.messages])
        token_ids = await self._encoded(text, "messages", whole=False)
        self._check(token_ids, "messages")
        max_tokens = asked.max_completion_tokens or asked.max_tokens or self._max_model_len - len(token_ids)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        return self._requests(asked, token_ids, max_tokens, logprobs)

    def close(self) -> None:
        self._encoder.shutdown()
        self._renderer.shutdown()
        if isinstance(self._template, ChatTemplate):
            self._template.close()

    async def _encoded(self, text: str, what: str, *, whole: bool) -> Sequence[int]:
        """Args:
        whole: with what the model's tokenizer puts around a text; a chat template has said that itself.
        """
        loop = asyncio.get_running_loop()
        # In another thread: a large text takes as long as many steps, and the library lets go of the interpreter.
        return await loop.run_in_executor(self._encoder, self._encode, text, what, whole)

    def _encode(self, text: str, what: str, whole: bool) -> Sequence[int]:
        """Raises Refusal early for a text far beyond the model's room: a MiB of text takes a second and 80 MiB."""
        num_chars = _CHARS_PER_TOKEN * self._max_model_len + _LEAST_CHARS
        if len(text) > num_chars:
            # What follows can join the last word of a beginning, but not halve the number of its tokens.
            least = len(self._tokenizer.encode(text[:num_chars])) // 2
            if least > self._max_model_len:
                raise self._too_long(f"more than {least}", what)
        return self._tokenizer.encode(text, add_special_tokens=whole)

    def _check(self, token_ids: Sequence[int], what: str) -> None:
        if not token_ids:
            raise Refusal(400, f"{what}: a prompt needs at least one token", param=what)
        if len(token_ids) >= self._max_model_len:
            raise self._too_long(str(len(token_ids)), what)
        try:
            check_tokens(list(token_ids), self._vocab_size, what)
        except InputError as error:
            raise Refusal(400, error.message, param=what) from None

    def _too_long(self, num_tokens: str, what: str) -> Refusal:
        return Refusal(
            400,
            f"{what}: {num_tokens} tokens leave no room for an output: this server has room for "
            f"{self._max_model_len} in all",
            param=what,
            code="context_length_exceeded",
        )

    def _requests(
        self, asked: GenerationRequest, token_ids: Sequence[int], max_tokens: int, logprobs: int | None
    ) -> list[Request]:
        if len(token_ids) + max_tokens > self._max_model_len:
            raise Refusal(
                400,
                f"max_tokens: {len(token_ids)} prompt tokens and {max_tokens} output tokens exceed the "
                f"{self._max_model_len} tokens of this server",
                param="max_tokens",
                code="context_length_exceeded",
            )
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        return [
            Request(
                request_id=str(index),
                prompt_token_ids=tuple(token_ids),
                sampling=SamplingParams(
                    max_tokens=max_tokens,
                    temperature=1.0 if asked.temperature is None else asked.temperature,
                    top_p=1.0 if asked.top_p is None else asked.top_p,
                    top_k=asked.top_k or 0,
                    seed=seed_of_choice(seed, index),
                    ignore_eos=bool(asked.ignore_eos),
                    logprobs=logprobs,
                ),
            )
            for index in range(asked.n or 1)
        ]

    async def _rendered(self, messages: list[dict[str, str]]) -> str:
        if isinstance(self._template, str):
            raise Refusal(
                400, f"chat is not possible with this model: {self._template}; use /v1/completions", code="no_chat"
            )
        try:
            async with asyncio.timeout(bounds.TEMPLATE_S):
                await self._rendering.acquire()
        except TimeoutError:
            headers = {"Retry-After": str(bounds.RETRY_AFTER_S)}
            raise Refusal(429, "the chat template is busy; try again later", code="busy", headers=headers) from None
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._renderer, self._template.render, messages)
        except TemplateFailed as error:
            message = f"messages: the model's chat template cannot say these: {error}"
            raise Refusal(400, message, param="messages", code="chat_template_failed") from None
        finally:
            self._rendering.release()


def seed_of_choice(seed: int, index: int) -> int:
    """Choice 0 has the seed itself, so that asking for more choices does not change it; the others follow from it."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8])
