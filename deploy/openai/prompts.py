"""Converts texts, token ids and conversations to engine prompts. Long texts take long: those are left to threads."""

import asyncio

from eagleray.cluster.frontend.prompts import TokensPrompt, num_to_take
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.openai.errors import ApiError, bad_requests, too_long
from eagleray.deploy.openai.limits import MAX_TOKENIZED, check_length
from eagleray.deploy.openai.messages import template_messages, template_variables
from eagleray.deploy.openai.requests import CompletionRequest, Conversation
from eagleray.deploy.openai.served_model import ServedModel
from eagleray.deploy.openai.truncate import excerpt

LONG = 100_000  # characters: as many tokens, at most, take some 20 MB to make
CUT_TOKENS = 64  # that the end of a text may have more where it is cut within a word
SHORT = 1000  # characters: they take less time than a thread takes to begin where others want the processor, too
RESERVED = frozenset(  # what the template's renderer takes for itself
    {
        *("self", "messages", "conversations", "tools", "chat_template", "template_kwargs"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    }
)


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """One or several. Raises `ApiError` 400 for those that are empty."""
    prompts = _as_list(request.prompt)
    if not prompts or not all(prompts):
        raise ApiError(400, "prompt is empty; give it at least one token", param="prompt")
    return prompts


async def completion_prompts(
    served: ServedModel, request: CompletionRequest, prompts: list[str | list[int]], params: SamplingParams
) -> list[TokensPrompt]:
    """The request's prompts as tokens, of which the last ones are taken where they are to be truncated."""
    last = num_to_take(params.truncate_prompt_tokens, served.max_model_len, params.max_tokens or 1)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [{"prompt_token_ids": prompt[-last if last else 0 :]} for prompt in prompts if isinstance(prompt, list)]
    most = None if last is None else MAX_TOKENIZED
    ids = await texts_tokens(served, texts, request.add_special_tokens, most, last=last)
    if last is not None:  # what is taken, and may be echoed, is not the text
        return [{"prompt_token_ids": each} for each in ids]
    return [{"prompt": text, "prompt_token_ids": each} for text, each in zip(texts, ids, strict=True)]


async def texts_tokens(
    served: ServedModel,
    texts: list[str],
    add_special_tokens: bool | None,
    max_tokens: int | None = None,
    *,
    last: int | None = None,
) -> list[list[int]]:
    """The token ids of each text, the `last` ones of more.

    Raises `ApiError` 400 for many more than the model holds, or for over `max_tokens`.

    A thread encodes what is long, and lets others go on.
    """
    tokenizer, special = served.tokenizer, add_special_tokens is not False
    most = served.max_model_len if max_tokens is None else max_tokens
    with bad_requests():
        if sum(map(len, texts)) <= SHORT:
            return [_encode(tokenizer, text, special, most, last) for text in texts]
        ids = await asyncio.to_thread(lambda: [_encode(tokenizer, text, special, most, last) for text in texts])
    if max_tokens is not None:
        _check_num_tokens(max(map(len, ids)), max_tokens)
    return ids


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool, max_tokens: int, last: int | None) -> list[int]:
    """Beginnings of a long text first: more tokens than there may be take much memory, hundreds of bytes each."""
    length = max(max_tokens, LONG)
    while length < len(text):
        _check_num_tokens(len(tokenizer.encode(text[:length], add_special_tokens=False)) - CUT_TOKENS, max_tokens)
        length *= 2
    return tokenizer.encode(text, add_special_tokens=add_special_tokens, last=last)


def _check_num_tokens(num_tokens: int, max_tokens: int) -> None:
    if num_tokens > max_tokens:
        raise too_long(f"a text has {num_tokens} tokens or more, and at most {max_tokens} are possible; shorten it")


async def tokens_text(served: ServedModel, token_ids: list[int]) -> str:
    """The text of token ids. Raises `ApiError` 400 for those that the tokenizer does not have."""
    tokenizer = served.tokenizer
    vocabulary = tokenizer.backend.get_vocab_size()
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocabulary:
            message = f"tokens holds {excerpt(token_id)}; give token ids from 0 to {vocabulary - 1}"
            raise ApiError(400, message, param="tokens")
    texts: list[str] = await asyncio.to_thread(  # of the library's ways, only this one lets other threads go on
        tokenizer.backend.decode_batch, [token_ids], skip_special_tokens=False
    )
    return texts[0]


def token_strings(served: ServedModel, token_ids: list[int]) -> list[str | None]:
    """As the vocabulary spells them."""
    return [served.tokenizer.backend.id_to_token(token_id) for token_id in token_ids]


async def conversation_prompt(
    served: ServedModel, conversation: Conversation, max_tokens: int | None = None
) -> TokensPrompt:
    """A conversation in the model's chat template. Raises `ApiError` 400, also for more tokens, as `texts_tokens`."""
    options = dict(conversation.chat_template_kwargs or {})
    if taken := sorted(options.keys() & RESERVED):
        message = f"chat_template_kwargs holds {taken[0]}, which is not a variable of a template; leave it out"
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
    if max_tokens is None:
        served.limits.check_text(text)
    else:
        check_length(text)
    (ids,) = await texts_tokens(served, [text], add_special_tokens=False, max_tokens=max_tokens)
    return {"prompt": text, "prompt_token_ids": ids}


def _as_list(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """A list that begins with a number is one prompt's token ids."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [each for each in prompt if isinstance(each, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]
