"""The model that an app serves: its engine, tokenizer, limits and defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.deploy.openai.errors import ApiError
from eagleray.deploy.openai.limits import Limits
from eagleray.deploy.openai.truncate import excerpt


@dataclass(frozen=True)
class ServedModel:
    """One model and the name it goes by."""

    engine: AsyncClient
    model_name: str
    max_model_len: int  # tokens of prompt and answer together
    created: int  # seconds since 1970
    defaults: Mapping[str, float] = field(default_factory=dict)  # of sampling, where a request does not say
    allow_priority: bool = False  # of clients that say theirs
    root: str | None = None  # where the model is, if that may be told

    @cached_property
    def limits(self) -> Limits:
        """The limits of prompts that are generated from."""
        return Limits.of(self.max_model_len, self.engine.tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `ApiError` 400 where the engine has none."""
        if self.engine.tokenizer is None:
            raise ApiError(400, "this server has no tokenizer; give prompts as token ids, without echo")
        return self.engine.tokenizer

    def check_priority(self, priority: int | None) -> None:
        """Raises `ApiError` 400 for one that asks for something where clients may not."""
        if priority and not self.allow_priority:
            message = f"priority is {excerpt(priority)}, but clients of this server do not choose theirs"
            remedy = "leave it out, or have its operator set allow_priority (--allow-priority)"
            raise ApiError(400, f"{message}; {remedy}", param="priority")

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` 404 for a model that is not this one."""
        if name and name != self.model_name:
            message = f"the model {excerpt(name)} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
