"""Finds out whether a Ray cluster requires a token, before Ray would retry in vain for 20 s."""

import os
from collections.abc import Callable
from typing import Protocol

from eagleray.cluster.errors import EngineStartError

MODE = "RAY_AUTH_MODE"
WHERE = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
ASK_S = 5.0
_ASK = "/ray.rpc.NodeInfoGcsService/CheckAlive"


class Loader(Protocol):
    """Ray's, of a user's token."""

    def has_token(self, *, ignore_auth_mode: bool) -> bool: ...

    def get_raw_token(self) -> str: ...


def use_token(address: str, found: str, loader: Loader, turn_on: Callable[[], None]) -> None:
    """Turn Ray's token authentication on if the cluster at HOST:PORT asks for a token and this user has one.

    `ray start` asks for the token in ~/.ray/auth_token where there is one, but who joins has to say RAY_AUTH_MODE.
    `found` says how the cluster was found. Raises `EngineStartError` with the remedy.
    """
    if not _refuses(address, None):
        return
    asks = f"the Ray cluster at {address} ({found}) asks for a token"
    mode = os.environ.get(MODE)
    if mode is not None and mode.lower() != "token":
        raise EngineStartError(f"{asks}, but {MODE} is {mode!r}; set it to token, or unset it")
    if not loader.has_token(ignore_auth_mode=True):
        raise EngineStartError(f"{asks}, and there is none in {WHERE}; use the token of the cluster's owner")
    turn_on()
    if _refuses(address, loader.get_raw_token()):
        raise EngineStartError(f"{asks}, and it is not the one in {WHERE}; use the token of the cluster's owner")


def _refuses(address: str, token: str | None) -> bool:
    """Whether the cluster answers that whoever asks is not known to it."""
    import grpc

    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(_ASK)(b"", timeout=ASK_S, metadata=metadata)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False
