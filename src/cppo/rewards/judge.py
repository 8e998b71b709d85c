"""A judge: another model behind an OpenAI-compatible endpoint, which rewards ask over HTTP.

Its replies are hostile: their size is limited, they are parsed strictly, and no redirect is followed. After a failed
request the run continues. Replies are kept on disk, so that a resumed run gets the same verdicts.
"""

import asyncio
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from cppo.errors import UserError
from cppo.rewards.replies import Replies

MAX_REPLY_BYTES = 1_000_000
MAX_TEXT_CHARS = 16_384
"""A longer text of a reply counts as none."""
MAX_REQUEST_CHARS = 200_000
"""Limit of all messages of a request; a longer request is not sent."""
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes after which the same request may succeed."""
MAX_PAUSE_SECONDS = 30.0
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Verdict:
    """Result of one request.

    Attributes:
        text: of the reply; None if the request failed.
        cached: whether the reply was on disk.
        seconds: time of the request, with its retries.
        prompt_tokens, completion_tokens: as the endpoint counts them; 0 if it does not, or nothing was sent.
    """

    text: str | None
    cached: bool = False
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Judge:
    """Asks a model behind an OpenAI-compatible endpoint (`/chat/completions`), at temperature 0.

    Args:
        url: of the endpoint up to `/chat/completions`, such as `http://127.0.0.1:8000/v1`, without user, password,
            query or fragment.
        model: its name there.
        key_variable: the environment variable that holds the key; the key itself is never written anywhere. None sends
            no key.
        cache: the file that keeps replies, at most 100,000; None keeps none.
        timeout: seconds until an attempt has its whole reply.
        retries: attempts after the first, if it timed out, the connection failed or the server was busy.
        pause: seconds before the first retry; each later pause is twice as long, at most 30 seconds.
        concurrency: requests at once.
        budget: seconds for all requests of a call; requests without a verdict by then have failed.
        max_tokens: of a reply.

    Raises:
        UserError: a value is out of its range, the variable is not set, or the file is no cache of replies.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str | None = None,
        cache: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        pause: float = 1.0,
        concurrency: int = 8,
        budget: float = 600.0,
        max_tokens: int = 256,
    ) -> None:
        _check_url(url)
        if not isinstance(model, str) or not model:
            raise UserError(f"model = {model!r}: give the judge's name at {url}")
        for name, value, least in (("timeout", timeout, 0.001), ("pause", pause, 0.0), ("budget", budget, 0.001)):
            if not _is_number(value) or not least <= value <= 86_400:
                raise UserError(f"{name} = {value!r}: give seconds from {least:g} to 86400")
        for name, value, least, most in (
            ("retries", retries, 0, 20),
            ("concurrency", concurrency, 1, 256),
            ("max_tokens", max_tokens, 1, 100_000),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(f"{name} = {value!r}: give a whole number from {least} to {most}")
        self._url, self._model, self._max_tokens = f"{url.rstrip('/')}/chat/completions", model, max_tokens
        self._timeout, self._retries, self._pause = timeout, retries, pause
        self._concurrency, self._budget = concurrency, budget
        self._headers = {"Accept-Encoding": "identity", **_authorization(key_variable)}
        self._replies = Replies(cache) if cache is not None else None

    def ask(self, requests: Sequence[Messages]) -> list[Verdict]:
        """The verdicts on chats, in order; equal ones are sent once."""
        bodies = [self._body(messages) for messages in requests]
        with ThreadPoolExecutor(1, thread_name_prefix="cppo-judge") as thread:  # a notebook has a loop already
            distinct = dict(zip(map(_key, bodies), bodies, strict=True))
            found = thread.submit(lambda: asyncio.run(self._ask(distinct))).result()
        return [found[_key(body)] for body in bodies]

    async def _ask(self, bodies: dict[str, dict[str, Any]]) -> dict[str, Verdict]:
        deadline, turns = time.monotonic() + self._budget, asyncio.Semaphore(self._concurrency)
        async with httpx2.AsyncClient(
            headers=self._headers, follow_redirects=False, trust_env=False, timeout=None
        ) as client:

            async def judged(body: dict[str, Any]) -> Verdict:
                async with turns:
                    return await self._verdict(client, body, deadline)

            verdicts = await asyncio.gather(*map(judged, bodies.values()))
        return dict(zip(bodies, verdicts, strict=True))

    def _body(self, messages: Messages) -> dict[str, Any]:
        return {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": self._max_tokens}

    async def _verdict(self, client: httpx2.AsyncClient, body: dict[str, Any], deadline: float) -> Verdict:
        started = time.monotonic()
        # The endpoint matters too: another one may serve another model by the same name.
        key = _key({"url": self._url, **body})
        if sum(len(message["content"]) for message in body["messages"]) > MAX_REQUEST_CHARS:
            return Verdict(None)
        if self._replies is not None and (kept := self._replies.get(key)) is not None:
            return Verdict(kept, cached=True)
        for attempt in range(self._retries + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                async with asyncio.timeout(min(self._timeout, left)):
                    status, content, pause = await self._post(client, body)
            except (TimeoutError, httpx2.HTTPError, httpx2.StreamError):
                status, content, pause = None, b"", 0.0
            if status == 200:
                verdict = _read(content, time.monotonic() - started)
                if self._replies is not None and verdict.text is not None:
                    self._replies.put(key, verdict.text)
                return verdict
            if status is not None and status not in RETRIED:
                break
            if attempt < self._retries:
                pause = min(max(pause, self._pause * 2**attempt), MAX_PAUSE_SECONDS)
                await asyncio.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        return Verdict(None, seconds=time.monotonic() - started)

    async def _post(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[int, bytes, float]:
        """The status, the bytes of the reply (none if too many), and the waiting time that the server asks for."""
        content, headers = bytearray(), {"Content-Type": "application/json"}
        async with client.stream("POST", self._url, content=_json(body), headers=headers) as response:
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    return response.status_code, b"", 0.0
            return response.status_code, bytes(content), _seconds(response.headers.get("retry-after"))


def log_verdicts(verdicts: Sequence[Verdict], unread: int, log_metric: Callable[[str, float], None] | None) -> None:
    """Log the judging of a batch, by TRL's `log_metric`, under `judge/`.

    unread: replies in another form than requested; they count as failed too.
    """
    if log_metric is None or not verdicts:
        return
    sent = [one for one in verdicts if not one.cached]
    log_metric("judge/requests", float(len(verdicts)))
    log_metric("judge/cached", float(len(verdicts) - len(sent)))
    log_metric("judge/failed", float(unread + sum(one.text is None for one in verdicts)))
    log_metric("judge/prompt_tokens", float(sum(one.prompt_tokens for one in sent)))
    log_metric("judge/completion_tokens", float(sum(one.completion_tokens for one in sent)))
    log_metric("judge/seconds", max((one.seconds for one in sent), default=0.0))


def _check_url(url: str) -> None:
    parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "url: give the judge's endpoint, such as http://127.0.0.1:8000/v1, without user, password, query and "
            "fragment (a key goes into an environment variable)"
        )


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(str(variable), "")
    if not key:
        raise UserError(f"key_variable: the environment variable {variable} is not set: put the judge's key there")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"key_variable: the environment variable {variable} holds characters that no key has")
    return {"Authorization": f"Bearer {key}"}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode("ascii")


def _key(content: dict[str, Any]) -> str:
    return hashlib.sha256(_json(content)).hexdigest()


def _read(content: bytes, seconds: float) -> Verdict:
    """The verdict in a reply; it has a text if the reply is a chat completion of allowed length."""
    try:
        reply = json.loads(content)
        text = reply["choices"][0]["message"]["content"]
        str.encode(text)  # no text, or half of a surrogate pair, which is not a character
    except (ValueError, LookupError, TypeError, RecursionError):
        return Verdict(None, seconds=seconds)
    if len(text) > MAX_TEXT_CHARS:
        return Verdict(None, seconds=seconds)
    usage = reply.get("usage")
    used = [
        _tokens(usage.get(name)) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")
    ]
    return Verdict(text, False, seconds, *used)


def _tokens(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else 0


def _seconds(text: str | None) -> float:
    """A `Retry-After` in seconds; 0 for any other."""
    return float(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 6 else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
