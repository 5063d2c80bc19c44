"""A server's configuration, from YAML, `serve run` or the command line."""

import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.frontend.generation_config import CHOICE_HELP, Choice
from eagleray.cluster.options import NULL, OptionError, options
from eagleray.deploy.cli.options import SERVED_MODEL_NAME
from eagleray.deploy.openai.middleware.api_keys import check_keys, key_digest, keys_of_file
from eagleray.deploy.openai.middleware.cors import ANY, check_origin
from eagleray.models.loading.model_dir import public_name

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SECRET = ("api_keys",)
BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most"}  # pydantic's
UNUSED = {  # options of the engine that have no effect here, and why
    "placement_timeout_s": "Ray Serve reserves a replica's room, and waits for it as long as it takes",
}
SCALING_FORM = """give it as '{"min_replicas": 1, "max_replicas": 4}'"""


class ServeArgs(BaseModel):
    """The engine's options under the names of `EngineConfig`, and these. Raises `ValidationError`, a `ValueError`.

    `placement_timeout_s` is none of them: Ray Serve waits for room itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineConfig
    served_model_name: str | None = Field(None, description=SERVED_MODEL_NAME)
    generation_config: Choice = Field("auto", description=CHOICE_HELP)
    num_replicas: int = Field(1, ge=1, description="number of engines, each with its own ranks")
    autoscaling_config: dict[str, Any] | None = Field(
        None, description="Ray Serve's AutoscalingConfig as JSON, instead of num_replicas"
    )
    max_surge_percent: int = Field(
        0, ge=0, le=100, description="how many more replicas than usual may run during an update, in percent"
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (), description="API keys, of which clients must send one, better given in a file; without any, all are let in"
    )
    api_keys_file: str | None = Field(None, description="file with API keys, one a line, on every node")
    guard_all: bool = Field(
        False,
        description="ask for a key at the page and at /metrics, too; then only health checks such as /health need none",
    )
    allowed_origins: tuple[str, ...] = Field(
        (ANY,),
        description="origins whose pages may send requests from a browser (CORS), separated by commas; * allows any, "
        "which is safe with keys, since cookies are not used; without keys name yours, or give '' for none",
    )
    max_queued_requests: int = Field(
        256,
        ge=0,
        description="maximum number of requests that wait in a replica, beside the max_num_seqs that run; more get "
        "429; choices of a request beyond its first have as many places of their own",
    )
    allow_priority: bool = Field(
        False,
        description="let clients set a priority: lower goes first, and others wait while such requests keep arriving",
    )
    max_body_bytes: int = Field(
        16 * 2**20, ge=1, description="maximum size of a request's body, in bytes; a longer one gets 413"
    )
    drain_timeout_s: float = Field(
        60.0, gt=0, description="seconds that running requests have to finish when a replica stops"
    )
    stall_timeout_s: float = Field(
        300.0, gt=0, description="seconds without news while requests run, after which the engine counts as dead"
    )
    health_check_period_s: float = Field(
        2.0, gt=0, description="seconds between health checks; three failures replace the replica"
    )

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        """Put the engine's options together; refuse names that nobody knows."""
        if not isinstance(given, dict) or isinstance(given.get("engine"), EngineConfig):
            return given
        check_used(given)
        known = known_names()
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"no such option: {', '.join(unknown)}; the options are {', '.join(sorted(known))}")
        engine = {name: value for name, value in given.items() if name in EngineConfig.names()}
        return {"engine": engine} | {name: value for name, value in given.items() if name in own_names()}

    @field_validator("api_keys", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        """`serve run` knows only text: values with commas between them."""
        return given.split(",") if isinstance(given, str) else given

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        """A single empty text stands for no origin."""
        origins = tuple(origin.strip() for origin in given)
        if origins == ("",):
            return ()
        for origin in origins:
            check_origin(origin)
        return origins

    @field_validator("autoscaling_config", mode="before")
    @classmethod
    def _check_autoscaling(cls, given: Any) -> Any:
        """An object, or its JSON; refuse what Ray Serve would drop without a word."""
        config = _object(given)
        if config is None:
            return None
        from ray.serve.config import AutoscalingConfig  # late: it takes a second, and most servers need none

        if unknown := sorted(config.keys() - AutoscalingConfig.model_fields.keys()):
            known = ", ".join(sorted(AutoscalingConfig.model_fields))
            raise ValueError(f"no such option: {', '.join(unknown)}; the options are {known}")
        try:
            AutoscalingConfig(**config)
        except ValidationError as error:
            raise ValueError(in_one_line(error)) from None
        return config

    @model_validator(mode="after")
    def _check_together(self) -> "ServeArgs":
        check_used({name for name in UNUSED if getattr(self.engine, name) != options(EngineConfig)[name].default})
        if self.autoscaling_config is not None and "num_replicas" in self.model_fields_set:
            raise ValueError(
                f"num_replicas is {self.num_replicas}, but autoscaling_config decides how many there are; leave one out"
            )
        if self.guard_all and not self.api_keys and self.api_keys_file is None:
            raise ValueError("guard_all asks for keys, and there are none; give api_keys_file, or leave it out")
        return self

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or public_name(self.engine.model)

    @property
    def max_replicas(self) -> int:
        """As many engines as there may be at once, without those of an update."""
        return self.num_replicas if self.autoscaling_config is None else self.autoscaling_config.get("max_replicas", 1)

    def without_keys(self) -> tuple["ServeArgs", tuple[bytes, ...]]:
        """The same without `api_keys`, and their digests: what others may see. Raises as `read_api_keys`."""
        keys = [key.get_secret_value() for key in self.api_keys]
        check_keys(keys)
        return self.model_copy(update={"api_keys": ()}), tuple(map(key_digest, keys))

    def read_api_keys(self) -> list[str]:
        """All keys, those of the file included. Raises `ValueError` for what no client can send, and for the file."""
        keys = [key.get_secret_value() for key in self.api_keys]
        check_keys(keys)
        return keys + ([] if self.api_keys_file is None else keys_of_file(Path(self.api_keys_file)))


def _object(given: Any) -> dict[str, Any] | None:
    """As it is, or read from JSON. Raises `ValueError`."""
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given)
        except json.JSONDecodeError as error:
            where = f"{error.msg} at character {error.pos + 1}"
            raise ValueError(f"{given[:80]!r} is not JSON ({where}); {SCALING_FORM}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{str(given)[:80]!r} is not an object; {SCALING_FORM}")
    return value


def in_one_line(error: ValidationError) -> str:
    """Each fault with its option's name; where the option says what it takes, that stands in for pydantic's words."""
    return "; ".join(map(_fault, error.errors()))


def _fault(fault: "ErrorDetails") -> str:
    path = [str(part) for part in fault["loc"] if part != "engine"]  # options of one level
    name = ".".join(path)
    if fault["type"] == "value_error":  # our own words
        error = fault["ctx"]["error"]
        message = error.words(NULL) if isinstance(error, OptionError) else str(error)
        return f"{name}: {message}" if name else message
    values = values_of(name) if fault["type"] != "missing" and name not in SECRET else ""
    return f"{name} is {fault['input']!r}; give {values}" if values else f"{name}: {fault['msg']}"


def values_of(name: str) -> str:
    """What an option takes, in words; nothing for texts and structures."""
    if name in options(EngineConfig):
        return options(EngineConfig)[name].values(NULL)
    field = ServeArgs.model_fields.get(name)
    if field is not None and field.annotation is bool:
        return "true or false"
    if field is None or field.annotation not in (int, float):
        return " or ".join(choices_of(name))
    kind = "a whole number" if field.annotation is int else "a number"
    bounds = {key: getattr(bound, key) for bound in field.metadata for key in BOUNDS if hasattr(bound, key)}
    if bounds.keys() == {"ge", "le"}:
        return f"{kind} from {bounds['ge']} to {bounds['le']}"
    return f"{kind} {' and '.join(f'{BOUNDS[key]} {value:g}' for key, value in bounds.items())}"


def choices_of(name: str) -> tuple[str, ...]:
    """The values of an option that has few."""
    annotation = ServeArgs.model_fields[name].annotation if name in ServeArgs.model_fields else None
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def help_of(name: str) -> str:
    """What an option does, and its default where that tells anything."""
    field = ServeArgs.model_fields[name]
    if field.default is None or field.default == () or field.default is False:
        return str(field.description)
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    return f"{field.description} (default: {default})"


def check_used(names: Collection[str]) -> None:
    """Raise `ValueError` for an option of the engine that would change nothing."""
    for name, why in UNUSED.items():
        if name in names:
            raise ValueError(f"{name} has no effect on a server: {why}; leave it out")


def known_names() -> frozenset[str]:
    """What YAML and `serve run` take."""
    return (EngineConfig.names() - UNUSED.keys()) | own_names()


def own_names() -> frozenset[str]:
    """The options that are not the engine's."""
    return frozenset(ServeArgs.model_fields) - {"engine"}


assert not own_names() & {field.name for field in fields(EngineConfig)}
