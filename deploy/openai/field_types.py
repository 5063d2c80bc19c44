"""Field types whose ranges appear in the OpenAPI document; `SamplingParams` checks them and words the errors."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, WrapValidator
from pydantic.config import JsonDict

from eagleray.cluster.core.messages import MAX_PRIORITY
from eagleray.cluster.options import Option, options
from eagleray.cluster.sampling_params import MAX_BIAS, SamplingParams

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 16_384  # of all of them: a table of so many states is made for each prompt
MAX_EXACT = 2**53  # up to it, bounds stay exact as the floats that FastAPI and browsers make of them
SAMPLING = options(SamplingParams)
DEFAULT_MAX_TOKENS: int = SAMPLING["max_tokens"].default  # of completions, as OpenAI's


def number_schema(option: Option, **others: Any) -> dict[str, Any]:
    """JSON schema of a number with bounds."""
    assert option.bounds is not None
    low, high = option.bounds
    least = {"exclusiveMinimum" if option.excluded == low else "minimum": low}
    most = {"maximum": high} if high <= MAX_EXACT else {"exclusiveMaximum": high + 1}
    return {"type": "integer" if option.kind == "int" else "number"} | least | most | others


def _count(name: str, **others: Any) -> WithJsonSchema:
    return WithJsonSchema(number_schema(SAMPLING[name], **others))


NumChoices = Annotated[int, _count("n")]
MaxTokens = Annotated[int, _count("max_tokens")]
MaxTokensOrNone = Annotated[int, _count("max_tokens", minimum=0)]
MinTokens = Annotated[int, _count("min_tokens")]
NumLogprobs = Annotated[int, _count("logprobs")]
Priority = Annotated[int, WithJsonSchema({"type": "integer", "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY})]

Truncation = Annotated[int, _count("truncate_prompt_tokens")]

MAX_REQUEST_ID = 128  # characters
RequestId = Annotated[str, Field(max_length=MAX_REQUEST_ID)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # OpenAI's
Role = Annotated[str, WithJsonSchema({"type": "string", "enum": list(ROLES)})]

TokenId = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]
Ids = Annotated[list[TokenId], Field(fail_fast=True)]
SomeIds = Annotated[list[TokenId], Field(fail_fast=True, json_schema_extra={"minItems": 1})]
SomeText = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1})]
SomeTexts = Annotated[list[SomeText], Field(fail_fast=True, json_schema_extra={"minItems": 1})]
OneOfMany = Annotated[SomeIds, WrapValidator(lambda ids, validate: validate(ids))]  # Python, so that others get a turn
ListsOfIds = Annotated[list[OneOfMany], Field(fail_fast=True, json_schema_extra={"minItems": 1})]
Stops = Annotated[list[SomeText], Field(fail_fast=True, json_schema_extra={"maxItems": MAX_STOP_STRINGS})]

BIASES = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
}
Biases = Annotated[dict[str, float], WithJsonSchema(BIASES)]


def request_type(option: Option) -> Any:
    """The type of a request's field for an option; None, JSON's null, is one of its values. Raises `TypeError`."""
    if option.bounds is not None:
        return Annotated[int if option.kind == "int" else float, WithJsonSchema(number_schema(option))] | None
    if option.kind in ("list[int]", "list[str]"):
        item: Any = TokenId if option.kind == "list[int]" else SomeText
        limits = {"minItems": option.min_length, "maxItems": option.max_length}
        extra: JsonDict = {name: limit for name, limit in limits.items() if limit}
        return Annotated[list[item], Field(fail_fast=True, json_schema_extra=extra or None)] | None
    if option.kind == "bool":
        return bool | None
    raise TypeError(f"no field of a request can be made of {option.name}, a {option.hint}; declare it by hand")
