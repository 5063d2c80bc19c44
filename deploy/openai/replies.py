"""What clients get. Fields that are not set are left out; those set to None are null."""

from typing import Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens of the prompts that were found in the prefix cache.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Of all prompts; a prompt counts once, however many choices it has.")
    completion_tokens: int = Field(description="Of all choices, end-of-sequence tokens included.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TextLogprobs(BaseModel):
    """Lists of one length, an entry for each token."""

    tokens: list[str] = Field(description="Texts; what is no whole character is `bytes:` and escapes, as `\\xf0`.")
    token_logprobs: list[float | None] = Field(description="null for the first token of a prompt.")
    top_logprobs: list[dict[str, float] | None] = Field(description="The most likely tokens, and the token itself.")
    text_offset: list[int] = Field(description="Where the token's text begins in the choice's, in characters.")


class Choice(BaseModel):
    index: int = Field(description="Choice i of prompt p is number p * n + i.")
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None = Field(description="null while it goes on.")
    stop_reason: int | str | None = Field(description="The stop text or stop token id; null for end of sequence.")


class Completion(BaseModel):
    """A whole answer, or an event of a stream: then each choice holds what is new."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = Field(None, description="In a stream only if asked for: in its last event, or in each.")


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(
        description="What it adds to the text, be it a part of a character; null if not known."
    )


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: Literal["default"] | None = Field(None, description="Where a request names one.")


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = Field(default=None, description="In a choice's first event.")
    content: str


class ChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class ChatCompletionChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice] = Field(description="Empty in the event with `usage` of all.")
    usage: Usage | None = None
    service_tier: Literal["default"] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int = Field(description="When the server started, in seconds since 1970.")
    owned_by: Literal["eagleray"]
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    prompt: str


class Version(BaseModel):
    version: str
