"""Text to token ids and back, and chat templates, without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from eagleray.cluster.prompts import Message


class Tokenizer:
    """A checkpoint's tokenizer."""

    eos_token_id: int | None
    bos_token_id: int | None
    has_chat_template: bool

    @classmethod
    def from_dir(cls, path: str | Path) -> Self:
        """Raises `ValueError` when the directory holds no tokenizer.json."""
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raise NotImplementedError

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text. Raises `ValueError` when there is no chat template or it refuses the messages."""
        raise NotImplementedError
