"""What clients send as the prompts that the engine takes. Long texts take long: those are left to threads."""

import asyncio
from collections.abc import Callable

from eagleray.cluster.chat import encoded
from eagleray.cluster.prompts import TokensPrompt
from eagleray.cluster.tokenizer import Tokenizer
from eagleray.deploy.openai.errors import ApiError, bad_requests
from eagleray.deploy.openai.messages import template_messages, template_variables
from eagleray.deploy.openai.schema import CompletionRequest, Conversation
from eagleray.deploy.openai.served import Served
from eagleray.deploy.openai.shown import shown

SHORT = 1000  # characters: they take less time than a thread takes to begin where others want the processor, too
RESERVED = frozenset(  # what the template's renderer takes for itself
    {
        *("self", "messages", "conversations", "tools", "chat_template", "template_kwargs"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    }
)


async def completion_prompts(served: Served, request: CompletionRequest) -> list[TokensPrompt]:
    """One or several. Raises `ApiError` 400 for those that are empty."""
    prompts = _as_list(request.prompt)
    if not prompts or not all(prompts):
        raise ApiError(400, "prompt is empty; give it at least one token", param="prompt")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [{"prompt_token_ids": prompt} for prompt in prompts if isinstance(prompt, list)]
    ids = await texts_tokens(served, texts, request.add_special_tokens)
    return [{"prompt": text, "prompt_token_ids": each} for text, each in zip(texts, ids, strict=True)]


async def texts_tokens(served: Served, texts: list[str], add_special_tokens: bool | None) -> list[list[int]]:
    """The token ids of each text. Raises `ApiError` 400.

    Prompts of completions were held to the model's length when the body was read. Texts of `/tokenize` may be longer,
    up to `max_body_bytes`; a thread encodes them, and lets others go on.
    """
    tokenizer, special = served.tokenizer, add_special_tokens is not False
    with bad_requests():
        if sum(map(len, texts)) <= SHORT:
            return _encode(tokenizer, texts, special)
        return await asyncio.to_thread(_encode, tokenizer, texts, special)


def _encode(tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]


async def tokens_text(served: Served, token_ids: list[int]) -> str:
    """The text of token ids. Raises `ApiError` 400 for those that the tokenizer does not have."""
    tokenizer = served.tokenizer
    vocabulary = tokenizer.backend.get_vocab_size()
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocabulary:
            message = f"tokens holds {shown(token_id)}; give token ids from 0 to {vocabulary - 1}"
            raise ApiError(400, message, param="tokens")
    texts: list[str] = await asyncio.to_thread(  # of the library's ways, only this one lets other threads go on
        tokenizer.backend.decode_batch, [token_ids], skip_special_tokens=False
    )
    return texts[0]


async def conversation_prompt(served: Served, conversation: Conversation, check: Callable[[str], None]) -> TokensPrompt:
    """A conversation in the model's chat template, as text for `check` before its tokens. Raises `ApiError` 400."""
    options = dict(conversation.chat_template_kwargs or {})
    if taken := sorted(options.keys() & RESERVED):
        message = f"chat_template_kwargs holds {taken[0]}, which is no variable of a template; leave it out"
        raise ApiError(400, message, param="chat_template_kwargs")
    goes_on = bool(conversation.continue_final_message)
    if goes_on and conversation.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt are both true; set one of them"
        raise ApiError(400, message, param="continue_final_message")
    options = template_variables(served.tokenizer, conversation) | options
    options |= {
        "continue_final_message": goes_on,
        "add_generation_prompt": conversation.add_generation_prompt is not False,
    }
    messages = template_messages(served.tokenizer, conversation)
    with bad_requests():
        text = await served.tokenizer.aapply_chat_template(messages, **options)
        check(text)
        if len(text) <= SHORT:
            return encoded(served.tokenizer, text)
        return await asyncio.to_thread(encoded, served.tokenizer, text)


def prompt_text(tokenizer: Tokenizer, prompt: TokensPrompt, *, skip_special_tokens: bool) -> str:
    """A prompt to echo: as it was given, or what its token ids say."""
    text = prompt.get("prompt")
    ids = prompt["prompt_token_ids"]
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) if text is None else text


def _as_list(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """A list that begins with a number is one prompt's token ids."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [each for each in prompt if isinstance(each, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]
