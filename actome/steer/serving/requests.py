"""What a request may ask for, in the words of OpenAI's API, and what is refused rather than passed over in silence."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Taken and without meaning here: they name a user, a cache or a bill.
_IDLE = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Of these only the value that asks for nothing is taken.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (None, ""),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}


class ClampChoice(BaseModel):
    """A clamp by name, at a multiple of its strength."""

    model_config = ConfigDict(extra="forbid")
    name: str
    scale: float = Field(default=1.0, ge=-100, le=100)


class StreamOptions(BaseModel):
    """Whether the last chunk tells how many tokens there were."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    clamps: list[str | ClampChoice] | None = None

    @model_validator(mode="after")
    def _nothing_is_passed_over(self) -> _Request:
        for name, value in (self.model_extra or {}).items():
            if name in _IDLE:
                continue
            if name not in _NOTHING:
                raise ValueError(f"there is no parameter {name!r}")
            if value not in _NOTHING[name] and value is not None:
                raise ValueError(f"{name}={value!r} is not supported; leave it out")
        if len(self.stops) > 4:
            raise ValueError("at most four stop strings")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings, as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(_Request):
    """Of ``POST /v1/completions``: one prompt, as text or token ids."""

    prompt: str | list[int] | list[str]


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="ignore")
    role: str
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """Its text; parts that are not text are refused."""
        if isinstance(self.content, str):
            return self.content
        if any(part.get("type") != "text" for part in self.content):
            raise ValueError("messages hold text only")
        return "".join(str(part.get("text", "")) for part in self.content)


class ChatRequest(_Request):
    """Of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
