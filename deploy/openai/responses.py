"""Response models. Fields that are not set are left out; those set to None are null."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

NEW_IDS = "With `return_token_ids`: ids of the generated tokens, the stop token included; in a stream, of the new ones."
PROMPT_IDS = "With `return_token_ids`: ids of the prompt's tokens; in a stream only in the first event."
FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens of the prompts that were found in the prefix cache.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens of all prompts; a prompt counts once, however many choices it has.")
    completion_tokens: int = Field(description="Generated tokens of all choices, end-of-sequence tokens included.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TextLogprobs(BaseModel):
    """Lists of one length, an entry for each token."""

    tokens: list[str] = Field(
        description="The tokens' texts; what is not a whole character is `bytes:` and escapes, such as `\\xf0`."
    )
    token_logprobs: list[float | None] = Field(
        description="Log-probability of each token; null for the first token of a prompt."
    )
    top_logprobs: list[dict[str, float] | None] = Field(description="The most likely tokens, and the token itself.")
    text_offset: list[int] = Field(description="Where the token's text begins in the choice's, in characters.")


class PromptLogprob(BaseModel):
    logprob: float
    rank: int = Field(description="Rank in the vocabulary; 1 is the most likely token.")
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]  # by token id, the token itself first; null for the first token


class Choice(BaseModel):
    index: int = Field(description="Choice i of prompt p is number p * n + i.")
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None = Field(description="null until the choice has ended.")
    stop_reason: int | str | None = Field(description="The stop text or stop token id; null for end of sequence.")
    token_ids: list[int] | None = Field(None, description=NEW_IDS)
    prompt_token_ids: list[int] | None = Field(None, description=PROMPT_IDS)
    prompt_logprobs: PromptLogprobs | None = Field(
        None, description="If asked for: log-probabilities of each token of the prompt."
    )


class Completion(BaseModel):
    """A whole answer, or an event of a stream: then each choice holds what is new."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = Field(
        None, description="Counts of tokens; in a stream only if asked for, in its last event or in each."
    )


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(
        description="The bytes that it adds to the text, perhaps part of a character; null if not known."
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
    token_ids: list[int] | None = Field(None, description=NEW_IDS)


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = Field(None, description=PROMPT_IDS)
    prompt_logprobs: PromptLogprobs | None = Field(
        None, description="If asked for: log-probabilities of each token of the prompt."
    )
    service_tier: Literal["default"] | None = Field(None, description="Present if the request names one.")


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = Field(default=None, description="Only in a choice's first event.")
    content: str


class ChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = Field(None, description=NEW_IDS)


class ChatCompletionChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice] = Field(description="Empty in the event that has only `usage`.")
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = Field(None, description=PROMPT_IDS)
    service_tier: Literal["default"] | None = None


class ModelPermission(BaseModel):
    """What all clients may do, in the form that vLLM has, for programs that look for it."""

    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int = Field(description="When the server started, in seconds since 1970.")
    owned_by: Literal["eagleray"]
    root: str = Field(description="The model's directory on the server.")
    parent: str | None = Field(description="Always null, since the model is not an adapter of another.")
    max_model_len: int = Field(description="Maximum number of tokens of prompt and answer together.")
    permission: list[ModelPermission]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = Field(
        None, description="If asked for: tokens as the vocabulary spells them; null for ids that it does not have."
    )


class TokenizerInfo(BaseModel):
    """What the model's tokenizer_config.json says."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    chat_template: str | None


class Load(BaseModel):
    server_load: int = Field(description="Number of prompts that run or wait here.")


class Text(BaseModel):
    prompt: str


class Version(BaseModel):
    version: str
