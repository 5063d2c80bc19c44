"""A client whose stream goes on while something else is done to its server."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from openai import OpenAI


@contextmanager
def another_streams(client: OpenAI, max_tokens: int) -> Iterator[None]:
    """The same seeded request again and again; at the end every answer must have been the same, and whole."""
    done = threading.Event()
    answers: list[str | BaseException] = []

    def answer() -> str:
        stream = client.completions.create(
            model="tiny", prompt="On and on", seed=1, max_tokens=max_tokens, stream=True, extra_body={"priority": -1}
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    def go_on() -> None:
        try:
            while not done.is_set():
                answers.append(answer())
        except BaseException as error:
            answers.append(error)

    expected = answer()
    other = threading.Thread(target=go_on, name="another client")
    other.start()
    try:
        yield
    finally:
        done.set()
        other.join()
    assert set(answers) == {expected}
