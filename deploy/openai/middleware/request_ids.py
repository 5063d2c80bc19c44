"""`X-Request-Id`: taken or generated, returned, and logged in one line per request."""

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagleray.deploy.openai.errors import ApiError
from eagleray.deploy.openai.middleware.respond import refuse
from eagleray.deploy.openai.truncate import excerpt

logger = logging.getLogger(__name__)

HEADER = b"x-request-id"
VALID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """400 for an id that is not 1 to 128 letters, digits or `._:-`; the application finds it in `scope["state"]`.

    With `reply` the answer carries it. Ray Serve's proxy gives it back itself, so below one there is nothing to do.
    """

    def __init__(self, app: ASGIApp, *, reply: bool) -> None:
        self._app = app
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), None)
        valid = given is None or VALID.fullmatch(given) is not None
        request_id = given.decode() if given and valid else uuid.uuid4().hex
        status = 0

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._reply:
                    message["headers"] = [*message.get("headers", ()), (HEADER, request_id.encode())]
            await send(message)

        begin = time.monotonic()
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            if valid:
                await self._app(scope, receive, answered)
            else:
                message = "X-Request-Id is not 1 to 128 letters, digits or ._:-; send another, or none"
                await refuse(answered, ApiError(400, message, code="invalid_request_id"))
        finally:
            seconds = time.monotonic() - begin
            path = excerpt(scope["path"])
            logger.info("request %s: %s %s %d in %.3f s", request_id, scope["method"], path, status, seconds)
