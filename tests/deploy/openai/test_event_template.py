"""Events from a template are, byte for byte, those of the chunks that they stand for."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from eagleray.deploy.openai.event_template import TEXT, EventTemplate, event
from eagleray.deploy.openai.generate import NOTHING_ELSE
from eagleray.deploy.openai.responses import ChatCompletionChunk, Completion

ODD_ID = 'mine "\\ \n text ü'


def completion_event(text: str) -> Completion:
    choice = {"index": 3, "text": text, **NOTHING_ELSE}
    fields = {"id": ODD_ID, "object": "text_completion", "created": 1, "model": ODD_ID, "choices": [choice]}
    return Completion.model_validate(fields)


def chat_event(text: str) -> ChatCompletionChunk:
    choice = {"index": 3, "delta": {"content": text}, **NOTHING_ELSE}
    fields = {"id": ODD_ID, "object": "chat.completion.chunk", "created": 1, "model": ODD_ID, "choices": [choice]}
    return ChatCompletionChunk.model_validate(fields)


@pytest.mark.parametrize("make", [completion_event, chat_event])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_events_are_those_of_the_chunks(make: Callable[[str], BaseModel], text: str) -> None:
    assert EventTemplate(make(TEXT)).event(text) == event(make(text))
