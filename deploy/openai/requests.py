"""Request models: OpenAI's fields, vLLM's extensions, and nothing that would change an answer and be ignored.

None, JSON's null, stands for a field's default everywhere, be that the model's own. What asks for nothing is dropped
(`unsupported_fields.py`). `SamplingParams` checks ranges and words the errors.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from eagleray.cluster.sampling_params import MAX_BIAS
from eagleray.deploy.openai.field_types import (
    DEFAULT_MAX_TOKENS,
    MAX_STOP_STRINGS,
    SAMPLING,
    Biases,
    Effort,
    Ids,
    ListsOfIds,
    MaxTokens,
    MaxTokensOrNone,
    MinTokens,
    NumChoices,
    NumLogprobs,
    Priority,
    RequestId,
    Role,
    SomeIds,
    SomeText,
    SomeTexts,
    Stops,
    Truncation,
    Verbosity,
    request_type,
)
from eagleray.deploy.openai.unsupported_fields import (
    IN_CHATS,
    IN_COMPLETIONS,
    IN_TOKENS,
    UnsupportedField,
    describe,
    without_neutral,
)

OPENAI = {"temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"}  # others that we have are extensions
NOT_IN_REQUESTS = {"logprobs", "detokenize"}  # the one differs between the two ways; text is what is answered
T = TypeVar("T", bound=BaseModel)

LOGGED = "Changes nothing: it goes to the server's log together with the answer's id."
CACHED = "Changes nothing: prefixes are cached as long as there is room."


class StrictModel(BaseModel):
    """An object all of whose fields are known: others that ask for something are errors, and so is a number as text."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    absent: ClassVar[Mapping[str, UnsupportedField]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, body: Any) -> Any:
        return without_neutral(body, cls.model_fields, cls.absent) if isinstance(body, dict) else body

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        describe(handler.resolve_ref_schema(schema), cls.absent)
        return schema


def absent_in(kind: Any) -> dict[str, UnsupportedField]:
    """What a body's model, or any of a union of models, takes as long as it asks for nothing."""
    if isinstance(kind, type):
        return dict(kind.absent) if issubclass(kind, StrictModel) else {}
    return {name: each for part in get_args(kind) for name, each in absent_in(part).items()}


class RequestBody(StrictModel):
    """A request's body."""

    model: str | None = Field(None, description="The model's name, as `/v1/models` lists it; may be left out.")


class StreamOptions(StrictModel):
    include_usage: bool | None = Field(default=None, description="Send one more event before `[DONE]`, with `usage`.")
    continuous_usage_stats: bool | None = Field(
        default=None, description="Extension: every event has `usage`, of its choice and the choice's prompt so far."
    )
    include_obfuscation: bool | None = Field(default=None, description="Changes nothing: events are not padded.")

    @property
    def asks(self) -> bool:
        """Whether any of it makes a difference."""
        return bool(self.include_usage or self.continuous_usage_stats)


def sampling_description(name: str) -> str:
    """What `SamplingParams` says of an option, in sentences, with its default."""
    option = SAMPLING[name]
    text = option.text[0].upper() + option.text[1:] if name in OPENAI else f"Extension: {option.text}"
    if option.default is None:
        return f"{text}."
    shown = json.dumps(option.default).removesuffix(".0")
    first = "the model's, or else " if option.of_model else ""
    return f"{text}. By default {first}{shown}."


def with_sampling(request: type[T]) -> type[T]:
    """The same model, with a field for every option of `SamplingParams` that it does not declare itself."""
    fields: dict[str, Any] = {
        name: (
            request_type(option),
            Field(
                None,
                description=sampling_description(name),
                examples=None if option.example is None else [option.example],
            ),
        )
        for name, option in SAMPLING.items()
        if name not in request.model_fields and name not in NOT_IN_REQUESTS
    }
    made: type[T] = create_model(
        request.__name__, __base__=request, __module__=request.__module__, __doc__=request.__doc__, **fields
    )
    return made


@with_sampling
class GenerationRequest(RequestBody):
    """What both ways to generate share. Options with a meaning of their own here, or that others depend on, are
    declared; the rest is as `SamplingParams` has it.
    """

    stream: bool | None = Field(None, description="Stream the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    n: NumChoices | None = Field(
        None,
        description="Choices for each prompt, 1 by default; each is drawn with a seed of its own, the first with "
        "`seed`. At `temperature` 0 all are equal.",
    )
    max_tokens: MaxTokens | None = Field(None, description="Maximum number of tokens generated for each choice.")
    stop: str | Stops | None = Field(
        None, description=f"Up to {MAX_STOP_STRINGS} texts that end a choice; they are not part of it."
    )
    logit_bias: Biases | None = Field(
        None, description=f"Token ids, as text, to numbers from -{MAX_BIAS} to {MAX_BIAS}."
    )

    user: str | None = Field(None, description=f"An id of the end user. {LOGGED}")
    safety_identifier: str | None = Field(None, description=f"The new name of `user`. {LOGGED}")
    metadata: dict[str, Any] | None = Field(None, description=f"What the client wants to remember. {LOGGED}")
    session_id: str | None = Field(None, description=f"Extension: an id that several requests share. {LOGGED}")
    request_id: RequestId | None = Field(None, description="Extension: the answer's `id` ends with it.")
    store: bool | None = Field(None, description="Changes nothing: this server does not keep answers.")
    service_tier: str | None = Field(None, description="Changes nothing: `default` is the only tier.")
    prompt_cache_key: str | None = Field(None, description=CACHED)
    prompt_cache_retention: str | None = Field(None, description=CACHED)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=CACHED)

    min_tokens: MinTokens | None = Field(None, description=sampling_description("min_tokens"))
    truncate_prompt_tokens: Truncation | None = Field(None, description=sampling_description("truncate_prompt_tokens"))
    prompt_logprobs: NumLogprobs | None = Field(
        None,
        description="Extension: log-probabilities of the prompt's tokens, with the N most likely ones; not in streams.",
    )
    return_token_ids: bool | None = Field(None, description="Extension: return the ids of prompt and answer, too.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Extension: in `logprobs`, write tokens as `token_id:7`."
    )
    priority: Priority | None = Field(
        None, description="Extension: lower goes first, where the server allows it; 0 by default, and always allowed."
    )


class CompletionRequest(GenerationRequest):
    """Continue prompts."""

    absent = IN_COMPLETIONS
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}]}
    )

    prompt: SomeText | SomeIds | SomeTexts | ListsOfIds = Field(description="Text, token ids, or a list of either.")
    echo: bool | None = Field(None, description="Put the prompt before the answer, in `logprobs`, too.")
    max_tokens: MaxTokensOrNone | None = Field(
        None,
        description="Maximum number of tokens generated for each choice; 0 only with `echo`. "
        f"{DEFAULT_MAX_TOKENS} by default.",
    )
    logprobs: NumLogprobs | None = Field(None, description="Log-probabilities, also of the N most likely tokens.")
    add_special_tokens: bool | None = Field(
        None, description="Extension: add a start token and the like; true by default."
    )
    best_of: int | None = Field(None, description="1 or `n`, which ask for nothing: choices are not ranked.")


class TextPart(BaseModel):
    """What else it has, such as `cache_control`, makes no difference."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text"]
    text: str


class RefusalPart(BaseModel):
    """What an assistant said instead of an answer; text like other text."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What was said."""
        return self.refusal


Parts = Annotated[list[TextPart | RefusalPart], Field(fail_fast=True)]


class ChatMessage(BaseModel):
    """Any further fields go to the model's chat template, unless they are null or empty."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Role = Field(description="One of these, or another that the model's chat template names.")
    content: str | Parts | None = Field(
        None, description="Text, or parts of type text, which newlines join; an assistant's may be null."
    )
    name: str | None = Field(None, description="A name of the participant, if the model's chat template uses it.")

    @property
    def others(self) -> dict[str, Any]:
        """Fields that are not here, those that say nothing left out."""
        return {name: value for name, value in (self.model_extra or {}).items() if value not in (None, [], {})}


class Conversation(BaseModel):
    """Messages, and how they become a prompt."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    add_generation_prompt: bool | None = Field(
        None,
        description="Extension: end the prompt with the beginning of an answer; true unless `continue_final_message`.",
    )
    continue_final_message: bool | None = Field(None, description="Extension: continue the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension: variables of the template.")


class ChatRequest(GenerationRequest, Conversation):
    """Answer a conversation."""

    absent = IN_CHATS
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 50}
            ]
        }
    )

    max_completion_tokens: MaxTokens | None = Field(None, description="The new name of `max_tokens`.")
    logprobs: bool | None = Field(None, description="Return log-probabilities of the tokens.")
    top_logprobs: NumLogprobs | None = Field(None, description="Also those of the N most likely tokens.")
    reasoning_effort: Effort | None = Field(
        None, description="A variable of the model's chat template; where that has no such variable, only `none`."
    )
    verbosity: Verbosity | None = Field(
        None, description="A variable of the model's chat template; where that has no such variable, only `medium`."
    )


class Tokenize(RequestBody):
    return_token_strs: bool | None = Field(None, description="Return each token as the vocabulary spells it, too.")


class TokenizeText(Tokenize):
    """A text."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Hello there"}]})

    prompt: str
    add_special_tokens: bool | None = Field(None, description="Add a start token and the like; true by default.")


class TokenizeChat(Tokenize, Conversation):
    """A conversation."""

    absent = IN_TOKENS
    model_config = ConfigDict(json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "Hello"}]}]})


def _kind(body: object) -> str:
    chats = isinstance(body, TokenizeChat) or (isinstance(body, dict) and "messages" in body)
    return CHAT_TAG if chats else TEXT_TAG


TEXT_TAG, CHAT_TAG = "with a text", "with messages"
TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag(TEXT_TAG)] | Annotated[TokenizeChat, Tag(CHAT_TAG)], Discriminator(_kind)
]


class DetokenizeRequest(RequestBody):
    """Token ids."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [72, 101]}]})

    tokens: Ids
