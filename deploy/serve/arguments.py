"""The command-line arguments of `eagleray serve`."""

import argparse
import logging
import os
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.options import check, option
from eagleray.deploy.cli.arguments import ENGINE_RENAMED, add_engine, engine_config
from eagleray.deploy.cli.options import add_options, given
from eagleray.deploy.serve.config import UNUSED, ServeArgs, check_used, choices_of, help_of, in_one_line, own_names

logger = logging.getLogger(__name__)

VARIABLE = "EAGLERAY_API_KEY"  # one, or several with commas between them
REPEATED = {"api_keys": "--api-key"}  # options that are given once for each value


@dataclass(frozen=True)
class Site:
    """Where Ray Serve offers the application, and under which name. Raises `ValueError` as `EngineConfig` does."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every address of the machine")
    port: int = option(8000, "port to listen on", (1, 65535))
    name: str = option("eagleray", "name of the application on Ray Serve")
    route_prefix: str = option("/", "what every path of the application begins with")

    def __post_init__(self) -> None:
        check(self)
        if not self.route_prefix.startswith("/") or (self.route_prefix.endswith("/") and self.route_prefix != "/"):
            raise ValueError(
                f"route_prefix is {self.route_prefix!r}; give one that begins with / and does not end with it"
            )

    def url(self, address: str | None = None) -> str:
        """Where the application is, seen from here or from `address`."""
        host = address or self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self.route_prefix.rstrip('/')}"


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray serve`."""
    add_options(parser.add_argument_group("site"), Site)
    server = parser.add_argument_group("server")
    for name, field in ServeArgs.model_fields.items():
        if name in own_names():
            flag = REPEATED.get(name, f"--{name.replace('_', '-')}")
            how: dict[str, Any] = {"action": "append", "metavar": "X"} if name in REPEATED else {"metavar": "X"}
            if field.annotation is bool:
                how = {"action": argparse.BooleanOptionalAction}
            if choices := choices_of(name):
                how = {"choices": choices}
            text = help_of(name).replace("%", "%%")
            server.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **how)
    add_engine(parser, positional=True, hidden=UNUSED)  # which `serve_args` refuses


def serve_args(arguments: argparse.Namespace) -> tuple[ServeArgs, Site]:
    """The server's options, and where it is to be. Raises `ValueError` for what cannot be, in one line."""
    own = {name: getattr(arguments, name) for name in own_names() if hasattr(arguments, name)}
    site = Site(**given(Site, arguments))
    check_used(given(EngineConfig, arguments, ENGINE_RENAMED))
    try:
        args = ServeArgs(engine=engine_config(arguments), **own | _keys(own))
    except ValidationError as error:
        raise ValueError(in_one_line(error)) from None
    args.read_api_keys()  # so that what it refuses is refused now
    return args, site


def _keys(own: dict[str, Any]) -> dict[str, Any]:
    """Those of the environment, from where no process that this one starts gets them, beside those of the flag."""
    by_flag = own.get("api_keys", [])
    if by_flag:
        logger.warning(
            "--api-key shows in `ps` to every user of this machine; %s or --api-keys-file does not", VARIABLE
        )
    named = os.environ.pop(VARIABLE, None)
    keys = [*by_flag, *([] if named is None else named.split(","))]
    return {"api_keys": keys} if keys else {}
