"""Requests as jobs of the engine, and their tokens as answers."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actome.core.clamp import Clamp
from actome.core.errors import ActomeError, nearest

from ..preference import scaled
from .decoder import Decoder
from .engine import Busy, Engine, Job

if TYPE_CHECKING:
    from actome.core.model import Model

    from .requests import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most.

    Attributes:
        prompt: tokens of a prompt; the model's context less one unless given.
        new: tokens generated for one request.
        default_new: tokens generated when the request does not say.
        seconds: from the arrival of a request to its end.
        body: bytes of a request.
        running, waiting: sequences decoded at once, and waiting beyond those.
    """

    prompt: int | None = None
    new: int = 2048
    default_new: int = 256
    seconds: float = 120.0
    body: int = 1 << 20
    running: int = 8
    waiting: int = 64


class Refused(Exception):
    """A request that cannot be served: status, message, the parameter at fault, and a code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        self.status, self.message, self.param, self.code = status, message, param, code


class Service:
    """Requests as jobs of the engine, and their tokens as answers."""

    def __init__(self, model: Model, clamps: Mapping[str, Sequence[Clamp]], name: str, limits: Limits):
        if model.tokenizer is None:
            raise ActomeError(f"{model.name} has no tokenizer; a server reads and writes text")
        if not getattr(model.module, "can_generate", lambda: False)():
            raise ActomeError(f"{type(model.module).__name__} cannot generate; load a class with a language-model head")
        for some in clamps.values():
            for one in some:
                model.match(one.site)
        self.model, self.clamps, self.name, self.limits = model, clamps, name, limits
        self.engine = Engine(model, most=limits.running, waiting=limits.waiting)
        self.began = int(time.time())
        ends = getattr(model.module.generation_config, "eos_token_id", None)
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    # -- reading a request --------------------------------------------------------------------------------------------

    def prompt(self, body: CompletionRequest) -> list[int]:
        """The ids of a prompt."""
        prompt: Any = body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise Refused(400, "one prompt a request", "prompt")
            prompt = prompt[0]
        if isinstance(prompt, str):
            _check_text(prompt, "prompt")
            return self.model.tokenizer(prompt)["input_ids"]
        vocab = int(self.model.info["vocab"])
        if any(not 0 <= token < vocab for token in prompt):
            raise Refused(400, f"token ids are 0 to {vocab - 1}", "prompt")
        return prompt

    def conversation(self, body: ChatRequest) -> list[int]:
        """The ids of a chat, as the model's template writes it."""
        tokenizer = self.model.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise Refused(400, f"{self.name} has no chat template; use /v1/completions", "messages")
        try:
            messages = [{"role": one.role, "content": one.text} for one in body.messages]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise what they like: jinja errors, and their own
            raise Refused(400, f"the model's chat template does not take these messages: {error}", "messages") from None
        _check_text(text, "messages")
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def chosen(self, body: Any) -> list[Clamp]:
        """The clamps of a request."""
        if body.clamps is None:
            return [one for some in self.clamps.values() for one in some]
        found: list[Clamp] = []
        for choice in body.clamps:
            name, scale = (choice, 1.0) if isinstance(choice, str) else (choice.name, choice.scale)
            if name not in self.clamps:
                known = nearest(name, self.clamps) or f"; there are: {', '.join(self.clamps) or 'none'}"
                raise Refused(400, f"there is no clamp {name!r}{known}", "clamps")
            try:
                found += [one if scale == 1.0 else scaled(one, scale) for one in self.clamps[name]]
            except ActomeError as error:
                raise Refused(400, str(error), "clamps") from None
        return found

    def job(self, body: Any, ids: list[int], decoder: Decoder, news: asyncio.Queue[Any]) -> Job:
        """A job that puts pieces of text, and at last why it ended, into a queue."""
        if body.model and body.model != self.name:
            message = f"there is no model {body.model!r}; this server has {self.name!r}"
            raise Refused(404, message, "model", "model_not_found")
        if not ids:
            raise Refused(400, "the prompt has no tokens", "prompt")
        context = self.model.context
        longest = min(self.limits.prompt or len(ids), context - 1 if context else len(ids))
        if len(ids) > longest:
            message = f"the prompt has {len(ids)} tokens, and at most {longest} are taken"
            raise Refused(400, message, "prompt", "context_length_exceeded")
        room = self.limits.new if context is None else min(self.limits.new, context - len(ids))
        asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
        if asked is not None and asked > room:
            raise Refused(400, f"max_tokens={asked}: after this prompt at most {room} can be generated", "max_tokens")
        loop = asyncio.get_running_loop()

        def give(item: Any) -> None:
            loop.call_soon_threadsafe(news.put_nowait, item)

        def on_token(token: int) -> bool:
            give(("text", decoder.push(token)))
            return not decoder.stopped

        def on_end(why: str, error: BaseException | None) -> None:
            give(("text", decoder.finish()))
            give(("end", why, error))

        return Job(
            ids,
            on_token,
            on_end,
            max_tokens=asked or min(self.limits.default_new, room),
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop_ids=self.ends,
            clamps=self.chosen(body),
            deadline=time.monotonic() + self.limits.seconds,
        )

    # -- answering ----------------------------------------------------------------------------------------------------

    async def answer(self, body: Any, ids: list[int], request: Any, chat: bool) -> Any:
        """The whole answer, or a stream of its pieces."""
        from fastapi.responses import StreamingResponse

        news: asyncio.Queue[Any] = asyncio.Queue()
        job = self.job(body, ids, Decoder(self.model.tokenizer, body.stops), news)
        try:
            self.engine.submit(job)
        except Busy as error:
            raise Refused(429, str(error), code="busy") from None
        shape = _Shape(self.name, chat)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(self._stream(job, news, shape, usage), media_type="text/event-stream")
        text = []
        try:
            while True:
                item = await self._next(news, request)
                if item[0] == "end":
                    break
                text.append(item[1])
        finally:
            job.cancelled = True  # whoever asked may have gone
        _, why, error = item
        if why in ("error", "timeout", "cancelled"):
            raise _failure(why, error, self.limits)
        return shape.whole("".join(text), why, _usage(job))

    async def _next(self, news: asyncio.Queue[Any], request: Any) -> Any:
        """The next piece of news; looks now and then whether anybody still waits for it."""
        while True:
            try:
                return await asyncio.wait_for(news.get(), 0.25)
            except TimeoutError:
                if await request.is_disconnected():
                    raise Refused(499, "the client has gone") from None

    async def _stream(self, job: Job, news: asyncio.Queue[Any], shape: _Shape, usage: bool) -> AsyncIterator[str]:
        try:
            if shape.chat:
                yield shape.piece("", first=True)
            while True:
                item = await news.get()
                if item[0] == "end":
                    break
                if item[1]:
                    yield shape.piece(item[1])
            _, why, error = item
            if why in ("error", "timeout", "cancelled"):
                failed = _failure(why, error, self.limits)
                body = {"message": failed.message, "type": "server_error", "param": None, "code": failed.code}
                yield f"data: {json.dumps({'error': body})}\n\n"
                return
            yield shape.piece("", why=why)
            if usage:
                yield shape.usage(_usage(job))
            yield "data: [DONE]\n\n"
        finally:
            job.cancelled = True  # the client may have gone in the middle


def _failure(why: str, error: BaseException | None, limits: Limits) -> Refused:
    if why == "timeout":
        return Refused(504, f"the answer was not through after {limits.seconds:g} s", code="timeout")
    if why == "cancelled":
        return Refused(503, "the server is shutting down", code="shutdown")
    return Refused(500, f"{type(error).__name__}: {error}", code="generation_failed")


def _usage(job: Job) -> dict[str, int]:
    read, made = len(job.ids), job.made
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


class _Shape:
    """Answers and chunks as OpenAI's clients expect them."""

    def __init__(self, model: str, chat: bool):
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.base = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def whole(self, text: str, why: str, usage: dict[str, int]) -> dict[str, Any]:
        """An answer that is not streamed."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {**self.base, "choices": [{"index": 0, "finish_reason": why, "logprobs": None, **said}], "usage": usage}

    def piece(self, text: str, first: bool = False, why: str | None = None) -> str:
        """One chunk as a server-sent event."""
        if self.chat:
            role = {"role": "assistant"} if first else {}
            said: dict[str, Any] = {"delta": {} if why else {**role, "content": text}}
        else:
            said = {"text": text}
        choice = {"index": 0, "finish_reason": why, "logprobs": None, **said}
        return self._event(choices=[choice])

    def usage(self, usage: dict[str, int]) -> str:
        """The chunk that tells how many tokens there were."""
        return self._event(choices=[], usage=usage)

    def _event(self, **fields: Any) -> str:
        base = {**self.base, "object": "chat.completion.chunk"} if self.chat else self.base
        return f"data: {json.dumps({**base, **fields})}\n\n"


def _check_text(text: str, name: str) -> None:
    """Refuses halves of surrogate pairs, which JSON can spell and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(400, "the text is not valid Unicode: it has half of a surrogate pair", name) from None
