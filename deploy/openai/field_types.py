"""Field types whose ranges appear in the OpenAPI document; `SamplingParams` checks them and words the errors."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, WrapValidator

from eagleray.cluster.frontend.front_end import MAX_PRIORITY
from eagleray.cluster.sampling_params import MAX_BAD_WORDS, MAX_SEED, MIN_SEED, RANGES

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 16_384  # of all of them: a table of so many states is made for each prompt


def _schema(name: str, kind: str, **others: Any) -> dict[str, Any]:
    """JSON schema of a number of `SamplingParams`."""
    low, high, _ = RANGES[name]
    return {"type": kind, "minimum": low, "maximum": high} | others


def _number(name: str) -> WithJsonSchema:
    return WithJsonSchema(_schema(name, "number"))


def _count(name: str, **others: Any) -> WithJsonSchema:
    return WithJsonSchema(_schema(name, "integer", **others))


NumChoices = Annotated[int, _count("n")]
MaxTokens = Annotated[int, _count("max_tokens")]
MaxTokensOrNone = Annotated[int, _count("max_tokens", minimum=0)]
MinTokens = Annotated[int, _count("min_tokens")]
Temperature = Annotated[float, _number("temperature")]
TopP = Annotated[float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1})]
TopK = Annotated[int, _count("top_k")]
MinP = Annotated[float, _number("min_p")]
Seed = Annotated[  # FastAPI writes bounds as floats, which have no 2**64 - 1
    int, WithJsonSchema({"type": "integer", "minimum": MIN_SEED, "exclusiveMaximum": MAX_SEED + 1})
]
PresencePenalty = Annotated[float, _number("presence_penalty")]
FrequencyPenalty = Annotated[float, _number("frequency_penalty")]
RepetitionPenalty = Annotated[float, _number("repetition_penalty")]
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
Words = Annotated[list[SomeText], Field(fail_fast=True, json_schema_extra={"maxItems": MAX_BAD_WORDS})]
Stops = Annotated[list[SomeText], Field(fail_fast=True, json_schema_extra={"maxItems": MAX_STOP_STRINGS})]

BIASES = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
Biases = Annotated[dict[str, float], WithJsonSchema(BIASES)]
