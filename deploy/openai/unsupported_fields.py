"""Fields that clients may send and this server does not support: refused by name where they ask for something.

Null and what is empty ask for nothing, whatever the field; so does a neutral value, such as `tool_choice: "none"`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOTHING: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class UnsupportedField:
    """A field of OpenAI's or vLLM's: what is lacking, and the values with which nobody asks for it."""

    lack: str
    neutral: tuple[Any, ...] = ()
    nothing: tuple[Any, ...] = NOTHING

    @property
    def accepted(self) -> tuple[Any, ...]:
        """Every value that asks for nothing."""
        return self.nothing + self.neutral


TOOLS = "this server does not call tools"
GUIDES = "this server does not constrain output (JSON, grammar)"
PROMPTS = "this server makes prompts only by the model's own chat template"
AUDIO = "this server answers with text only"
SEARCH = "this server does not search"
BEAMS = "this server does not do beam search"
TRANSFER = "this server does not transfer KV caches"

EVERYWHERE: dict[str, UnsupportedField] = {
    "response_format": UnsupportedField(GUIDES, ({"type": "text"},)),
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag"),
        UnsupportedField(GUIDES),
    ),
    "use_beam_search": UnsupportedField(BEAMS, (False,)),
    "early_stopping": UnsupportedField(BEAMS, (False,)),
    "length_penalty": UnsupportedField(BEAMS, (1, 1.0)),
    "spaces_between_special_tokens": UnsupportedField("this server writes tokens as the tokenizer does", (True,)),
    "thinking_token_budget": UnsupportedField("this server does not separate reasoning from answers"),
    "include_reasoning": UnsupportedField("this server does not separate reasoning from answers", (True,)),
    "stream_interval": UnsupportedField("this server sends tokens as soon as they are generated", (1,)),
    "truncation_side": UnsupportedField("this server leaves out the beginnings of prompts", ("left",)),
    "logprob_token_ids": UnsupportedField("this server reports log-probabilities of the most likely tokens"),
    "return_prompt_text": UnsupportedField("`/tokenize` and `/detokenize` return a conversation's text", (False,)),
    "return_token_offsets": UnsupportedField("this server does not report offsets", (False,)),
    "repetition_detection": UnsupportedField("this server does not look for repetitions"),
    "watermarking": UnsupportedField("this server does not add watermarks", (False,)),
    "cache_salt": UnsupportedField("all requests share this server's prefix cache"),
    "kv_transfer_params": UnsupportedField(TRANSFER),
    "ec_transfer_params": UnsupportedField(TRANSFER),
    "logits_processors": UnsupportedField("this server does not run clients' code"),
    "vllm_xargs": UnsupportedField("this server has no extensions"),
}
IN_COMPLETIONS = EVERYWHERE | {
    "suffix": UnsupportedField("this server does not fill in text between two others"),
    "prompt_embeds": UnsupportedField("this server takes prompts as text or token ids"),
}
IN_CHATS = EVERYWHERE | {
    "tools": UnsupportedField(TOOLS),
    "tool_choice": UnsupportedField(TOOLS, ("none", "auto")),
    "parallel_tool_calls": UnsupportedField(TOOLS, (True, False)),  # of which there are none
    "functions": UnsupportedField(TOOLS),
    "function_call": UnsupportedField(TOOLS, ("none", "auto")),
    "modalities": UnsupportedField(AUDIO, (["text"],)),
    "audio": UnsupportedField(AUDIO),
    "prediction": UnsupportedField("this server does not use predicted outputs"),
    "web_search_options": UnsupportedField(SEARCH, nothing=(None,)),  # an empty one asks for a search
    "moderation": UnsupportedField("this server does not moderate content"),
    "best_of": UnsupportedField("this server does not rank choices", (1,)),
    "echo": UnsupportedField("this server does not repeat messages", (False,)),
    "add_special_tokens": UnsupportedField(PROMPTS, (False,)),
    "chat_template": UnsupportedField(PROMPTS),
    "documents": UnsupportedField(PROMPTS),
    "media_io_kwargs": UnsupportedField("this server takes text alone"),
    "mm_processor_kwargs": UnsupportedField("this server takes text alone"),
}
IN_TOKENS = {name: IN_CHATS[name] for name in ("tools", "add_special_tokens", "chat_template", "mm_processor_kwargs")}
UNKNOWN = UnsupportedField("this server has no such field")


def without_neutral(body: dict[str, Any], fields: object, absent: Mapping[str, UnsupportedField]) -> dict[str, Any]:
    """A body without what asks for nothing and is not one of `fields`, a container of names."""
    left_out = [name for name in body if name not in fields and _is_nothing(body[name], absent.get(name, UNKNOWN))]  # type: ignore[operator]
    return {name: value for name, value in body.items() if name not in left_out} if left_out else body


def _is_nothing(value: Any, absent: UnsupportedField) -> bool:
    """JSON's `true` is not its 1, as it is in Python. Parts of an object that are null say nothing either."""
    if isinstance(value, dict):
        value = {name: part for name, part in value.items() if part is not None}
    return any(type(value) is type(each) and value == each for each in absent.accepted)


def describe(schema: dict[str, Any], absent: Mapping[str, UnsupportedField]) -> None:
    """Let a body's JSON schema say all this."""
    schema["additionalProperties"] = {"enum": list(NOTHING), "description": "Nothing else is known."}
    for name, each in absent.items():
        description = f"Not supported: {each.lack}. These values ask for nothing."
        schema["properties"][name] = {"enum": list(each.accepted), "description": description}
