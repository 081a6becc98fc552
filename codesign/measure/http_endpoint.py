"""HttpEndpoint: the load generator's Endpoint for any OpenAI-compatible server, over many connections at once.

    with HttpEndpoint("http://127.0.0.1:8000", model="m") as endpoint:
        result = drive(endpoint, load)

Prompts are sent as token ids to `/v1/completions`, so that the server works on exactly the workload's tokens. One
thread reads all streams and stamps what arrives; a request's tokens are handed over when it has ended, with their
times. `measure.completion_stream` says how tokens are counted. A 429 is a rejected request, which is counted; anything
else that goes wrong ends the trial:

    400 404 413 422        unsupported   the server cannot do what was asked, in its words
    401 403                harness       our key, not the configuration
    other statuses, reset  crashed
    silence                hang
    not such a stream      protocol
"""

import asyncio
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self

import httpx

from codesign.measure.completion_stream import CompletionStream
from codesign.measure.session import TokenEvent, TrialFailed
from codesign.results.record import Outcome, OutcomeKind
from codesign.spec.request import Request

_MAX_LINE_BYTES = 2**20
_DETAIL_BYTES = 500
_KINDS: dict[int, OutcomeKind] = {
    **dict.fromkeys((400, 404, 413, 422), "unsupported"),
    **dict.fromkeys((401, 403), "harness"),
}


class HttpEndpoint:
    """Args:
    base_url: of the server, without `/v1`.
    model: as the server names it.
    api_key: sent as a bearer token.
    silence_s: longest wait for the next bytes of a stream; then it is a hang.
    extra: further keys of each request, e.g. {"return_token_ids": True} on vLLM, which conversations need.

    Attributes:
        num_tokens, num_pieces: of all completions so far; more tokens than pieces: some came together, with one time.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        api_key: str | None = None,
        silence_s: float = 60.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._url = f"{base_url.rstrip('/')}/v1/completions"
        self._model, self._extra = model, dict(extra or {})
        # No proxy and no netrc from the environment: what is measured is the server and nothing between.
        self._client = httpx.AsyncClient(
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=httpx.Timeout(silence_s, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        self._heard: queue.SimpleQueue[TokenEvent | BaseException] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._tasks: dict[str, asyncio.Task[list[TokenEvent]]] = {}  # only touched by the thread
        self.num_tokens = self.num_pieces = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http-endpoint", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        self._check()
        self._loop.call_soon_threadsafe(self._start, request)

    def abort(self, request_id: str) -> None:
        """Drops the connection, which is how a client of such a server gives up."""
        self._check()
        self._loop.call_soon_threadsafe(self._cancel, request_id)

    def poll(self, timeout_s: float) -> Sequence[TokenEvent]:
        self._check()
        found: list[TokenEvent] = []
        try:
            item = self._heard.get(timeout=timeout_s) if timeout_s > 0 else self._heard.get_nowait()
            while True:
                if isinstance(item, BaseException):
                    self._failure = item
                    self._check()
                else:
                    found.append(item)
                item = self._heard.get_nowait()
        except queue.Empty:
            return found

    def close(self) -> None:
        """Drops all connections and ends the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._failure = self._failure or TrialFailed(Outcome(kind="harness", detail="the endpoint is closed"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    # In the thread.

    def _start(self, request: Request) -> None:
        task = self._loop.create_task(self._complete(request))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda done: self._finish(request.request_id, done))

    def _finish(self, request_id: str, task: "asyncio.Task[list[TokenEvent]]") -> None:
        """Puts what came of a request into the queue; a task that is cancelled at once never ran."""
        del self._tasks[request_id]
        if task.cancelled():
            self._heard.put(TokenEvent(request_id, -1, time.perf_counter(), "aborted"))
            return
        error = task.exception()
        for item in task.result() if error is None else [error]:
            self._heard.put(item)

    def _cancel(self, request_id: str) -> None:
        if request_id in self._tasks:
            self._tasks[request_id].cancel()

    async def _end(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _complete(self, request: Request) -> list[TokenEvent]:
        try:
            return await self._answer(request, time.perf_counter())
        except httpx.HTTPError as error:
            raise TrialFailed(_outcome(error)) from None

    async def _answer(self, request: Request, sent_s: float) -> list[TokenEvent]:
        async with self._client.stream("POST", self._url, json=self._body(request)) as response:
            if response.status_code == 429:
                return [TokenEvent(request.request_id, -1, time.perf_counter(), "rejected", sent_s)]
            if response.status_code != 200:
                raise TrialFailed(await _refusal(response))
            stream = CompletionStream(request, sent_s=sent_s)
            async for line in _lines(response):
                if not line.startswith(b"data:"):
                    continue  # blank lines between events, and comments that keep a connection alive
                data = line[5:].strip()
                if data == b"[DONE]":
                    break
                stream.hear(_parsed(data), time.perf_counter())
        events = stream.events()
        self.num_tokens, self.num_pieces = self.num_tokens + len(events), self.num_pieces + stream.num_pieces
        return events

    def _body(self, request: Request) -> dict[str, Any]:
        """Only what is asked for: servers refuse, or silently ignore, what they do not know."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(request.prompt_token_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if sampling.top_p != 1:
            body["top_p"] = sampling.top_p
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.ignore_eos:
            body["ignore_eos"] = True
        if sampling.stop_token_ids:
            body["stop_token_ids"] = list(sampling.stop_token_ids)
        return body | self._extra


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    left = b""
    async for piece in response.aiter_raw():
        *whole, left = (left + piece).split(b"\n")
        for line in whole:
            yield line
        if len(left) > _MAX_LINE_BYTES:
            raise TrialFailed(Outcome(kind="protocol", detail="a line of the stream is longer than 1 MiB"))
    yield left


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TrialFailed(Outcome(kind="protocol", detail=f"not JSON in the stream: {error}")) from None


async def _refusal(response: httpx.Response) -> Outcome:
    text = b""
    async for piece in response.aiter_raw():
        text += piece
        if len(text) >= _DETAIL_BYTES:
            break
    said = ascii(text[:_DETAIL_BYTES].decode("utf-8", "replace"))
    status = response.status_code
    return Outcome(kind=_KINDS.get(status, "crashed"), detail=f"the server answered {status}: {said}")


def _outcome(error: httpx.HTTPError) -> Outcome:
    what = f"{type(error).__name__} {error}".strip()
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return Outcome(kind="hang", detail=f"the server was silent for too long ({what})")
    return Outcome(kind="crashed", detail=f"the connection to the server failed ({what})")
