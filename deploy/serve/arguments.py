"""The command-line arguments of `eagleray serve`."""

import argparse
import logging
import os
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from eagleray.deploy.cli.arguments import add_engine, engine_config
from eagleray.deploy.serve.config import ServeArgs, choices_of, help_of, in_one_line, own_names

logger = logging.getLogger(__name__)

VARIABLE = "EAGLERAY_API_KEY"  # one, or several with commas between them
REPEATED = {"api_keys": "--api-key"}  # options that are given once for each value


@dataclass(frozen=True)
class Site:
    """Where Ray Serve offers the application, and under which name."""

    host: str
    port: int
    name: str
    route_prefix: str

    def url(self, address: str | None = None) -> str:
        """Where the application is, seen from here or from `address`."""
        host = address or self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self.route_prefix.rstrip('/')}"


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray serve`."""
    site = parser.add_argument_group("site")
    site.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 is everywhere (default: 127.0.0.1)")
    site.add_argument("--port", type=_port, default=8000, metavar="N", help="where to listen (default: 8000)")
    site.add_argument("--name", default="eagleray", help="of the application on Ray Serve (default: eagleray)")
    site.add_argument(
        "--route-prefix", type=_route, default="/", metavar="PATH", help="what all its paths begin with (default: /)"
    )
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
    add_engine(parser, positional=True)


def serve_args(arguments: argparse.Namespace) -> tuple[ServeArgs, Site]:
    """The server's options, and where it is to be. Raises `ValueError` for what cannot be, in one line."""
    own = {name: getattr(arguments, name) for name in own_names() if hasattr(arguments, name)}
    site = Site(arguments.host, arguments.port, arguments.name, arguments.route_prefix)
    try:
        args = ServeArgs(engine=engine_config(arguments), **own | _keys(own))
    except ValidationError as error:
        raise ValueError(in_one_line(error)) from None
    args.read_api_keys()  # so that what it refuses is refused now
    return args, site


def _keys(own: dict[str, Any]) -> dict[str, Any]:
    """Those of the environment, from where no process that this one starts gets them, beside those of the flag."""
    given = own.get("api_keys", [])
    if given:
        logger.warning(
            "--api-key shows in `ps` to every user of this machine; %s or --api-keys-file does not", VARIABLE
        )
    named = os.environ.pop(VARIABLE, None)
    keys = [*given, *([] if named is None else named.split(","))]
    return {"api_keys": keys} if keys else {}


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number from 1 to 65535")
    return int(text)


def _route(text: str) -> str:
    if not text.startswith("/") or (text.endswith("/") and text != "/"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a prefix; begin it with / and do not end it with one")
    return text
