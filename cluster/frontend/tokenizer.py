"""The tokenizer: text to token ids and back, and chat templates.

transformers reads a checkpoint's files, see `tokenizer_files.py`; of its tokenizer, this takes the two parts that do
the work: the `tokenizers` library and the template renderer, so that nothing here imports torch. The renderer has a
process of its own.
"""

import re
from collections.abc import Sequence
from inspect import isfunction
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as Backend

from eagleray.cluster.frontend.chat_renderer import chat_renderer
from eagleray.cluster.frontend.prompts import Message
from eagleray.cluster.frontend.token_bytes import TokenBytes
from eagleray.cluster.frontend.token_spelling import Spelling
from eagleray.cluster.frontend.tokenizer_files import MAX_BYTES, build_tokenizer
from eagleray.cluster.options import check_text
from eagleray.models.json_file import read_object


class Tokenizer:
    """A checkpoint's tokenizer: the same ids and the same text as transformers' `AutoTokenizer`."""

    def __init__(
        self,
        backend: Backend,
        special_tokens: dict[str, str],
        chat_templates: dict[str, str],
        folder: Path | None = None,
    ) -> None:
        """`special_tokens` has named ones, "bos_token" -> "<s>"; `chat_templates` has the usual one under "default".

        `folder` is where all of this was read.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.folder = folder
        self.special_tokens = special_tokens
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.token_bytes = TokenBytes(backend)
        self.spelling = Spelling(backend)
        self._texts: dict[int, str] = {}
        self._chat_templates = chat_templates
        self._words: dict[str, bool] = {}  # that the usual one was asked for

    @classmethod
    def from_dir(cls, path: str | Path) -> Self:
        """Read tokenizer.json and what stands beside it. Raises `ValueError` when there is none or it is broken."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not isfile(file):
            missing = f"there is no {file}" if isdir(folder) else f"there is no directory {folder}"
            raise ValueError(
                f"{missing}; name a directory with a tokenizer.json as `tokenizer`, or make one with transformers' "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{file} has {size} bytes, and {MAX_BYTES} is the limit; fetch the file again")
        theirs = build_tokenizer(folder)
        templates = theirs.chat_template or {}
        named = templates if isinstance(templates, dict) else {"default": templates}
        return cls(theirs.backend_tokenizer, theirs.special_tokens_map, named, folder)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return bool(self._chat_templates)

    @property
    def chat_template(self) -> str | None:
        """The usual one."""
        return self._chat_templates.get("default")

    def chat_template_names(self, role: str) -> bool:
        """Whether the chat template contains this in quotes, as it does the roles that it distinguishes."""
        template = self._chat_templates.get("default", "")
        return f"'{role}'" in template or f'"{role}"' in template

    def chat_template_has(self, name: str) -> bool:
        """Whether the chat template contains this word, as it does the variables and message fields that it uses."""
        if name not in self._words:  # few are asked for, and once for each message
            template = self._chat_templates.get("default", "")
            self._words[name] = re.search(rf"\b{re.escape(name)}\b", template) is not None
        return self._words[name]

    def warm_up(self) -> bool:
        """Start the process that chat templates need, while others wait for something else; whether there was none."""
        return self.has_chat_template and chat_renderer().warm_up()

    def cool_down(self) -> None:
        """End that process, unless it has been used."""
        chat_renderer().end_unused()

    def encode(self, text: str, *, add_special_tokens: bool = True, last: int | None = None) -> list[int]:
        """Token ids; special tokens are those that the tokenizer puts around a text, such as a start token.

        Of more than `last` only so many are there, the text's last ones with the special tokens around them.
        Other threads go on meanwhile: of the library's ways to encode, only batches let them.
        """
        check_text(text)
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if last is not None and len(encoding.ids) > last:
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=False)
            num_special = self.backend.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
            encoding.truncate(max(0, last - num_special), direction="left")
            encoding = self.backend.post_process(encoding, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text; half a character becomes U+FFFD, an id that the tokenizer does not have becomes nothing."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def text_of(self, token_id: int) -> str:
        """The text of a token alone, special or not; cached, since log-probabilities ask for many with each step."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """The conversation as text, special tokens included: encode it with `add_special_tokens=False`.

        `options` are add_generation_prompt, which is True by default unless continue_final_message is, tools, and the
        template's variables. Raises `ValueError` when there is no chat template, or it refuses the messages, or takes
        more time or memory than it may. Another process does the work.
        """
        return chat_renderer().render(*self._chat(messages, **options))

    async def aapply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """As `apply_chat_template`, while others go on."""
        return await chat_renderer().arender(*self._chat(messages, **options))

    def _chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[Any] | None = None,
        **variables: Any,
    ) -> tuple[str, list[Message], dict[str, Any]]:
        """What the renderer takes."""
        name = "tool_use" if tools and "tool_use" in self._chat_templates else "default"
        if name not in self._chat_templates:
            raise ValueError("this model has no chat template; give plain prompts, or name a tokenizer that has one")
        if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
            raise ValueError(f'messages are {messages!r}; give a list of {{"role": …, "content": …}}')
        options = self.special_tokens | variables
        options["tools"] = [_schema(tool) for tool in tools] if tools else None
        options["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        options["continue_final_message"] = continue_final_message
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return self._chat_templates[name], said, options

    @property
    def config(self) -> dict[str, Any]:
        """What tokenizer_config.json says."""
        return {} if self.folder is None else read_object(self.folder / "tokenizer_config.json")

    def in_transformers(self) -> Any:
        """transformers' own, built again, since its methods change it. Raises `ValueError` if this is of no folder."""
        if self.folder is None:
            raise ValueError("this tokenizer was not read from a folder, so that transformers cannot read it either")
        return build_tokenizer(self.folder)

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        token_id: int | None = None if token is None else self.backend.token_to_id(token)
        return token_id


def _schema(tool: Any) -> Any:
    """A tool's, which transformers knows how to make of a function."""
    if not isfunction(tool):
        return tool
    from transformers.utils.chat_template_utils import get_json_schema

    return get_json_schema(tool)
