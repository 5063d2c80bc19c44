"""`eagleray`: picks the command, runs it, and turns every error into one line and an exit code."""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, TextIO

from eagleray.cluster.errors import EngineDeadError, EngineStartError
from eagleray.deploy.cli.arguments import Parser, nearest
from eagleray.deploy.cli.ending import TERMINATED, ending_on_sigterm
from eagleray.models.loading.demo_model import DemoModelError, demo_model
from eagleray.models.loading.hub import FetchError

FAILED = 1  # the engine, or one of the requests
MISUSED = 2  # what was asked for cannot be
INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """Functions are named as module:function and imported when needed: no command waits for another's imports."""

    summary: str
    add_arguments: str
    run: str
    drains: bool = False  # sees to SIGTERM itself


COMMANDS = {
    "generate": Command(
        "answer prompts, many at once, and stream the answers",
        "eagleray.deploy.cli.arguments:add_generate",
        "eagleray.deploy.cli.generate:run",
    ),
    "chat": Command(
        "talk with a model",
        "eagleray.deploy.cli.arguments:add_chat",
        "eagleray.deploy.cli.chat:run",
    ),
    "serve": Command(
        "offer a model over HTTP as OpenAI does, on Ray Serve",
        "eagleray.deploy.serve.arguments:add_serve",
        "eagleray.deploy.serve.command:run",
        drains=True,
    ),
    "batch": Command(
        "answer a file of OpenAI requests; a job that was killed resumes where it stopped",
        "eagleray.deploy.batch.arguments:add_batch",
        "eagleray.deploy.batch.command:run",
    ),
    "bench latency": Command(
        "measure how long batches of one size take",
        "eagleray.deploy.bench.arguments:add_latency",
        "eagleray.deploy.bench.latency:run",
    ),
    "bench throughput": Command(
        "measure what many requests get, all at once or as they arrive",
        "eagleray.deploy.bench.arguments:add_throughput",
        "eagleray.deploy.bench.throughput:run",
    ),
    "bench serve": Command(
        "measure what a server with OpenAI's API gives to many clients",
        "eagleray.deploy.bench.arguments:add_serve",
        "eagleray.deploy.bench.serve:run",
    ),
    "profile": Command(
        "write torch profiles of decode steps and say what they spend their time on",
        "eagleray.deploy.bench.arguments:add_profile",
        "eagleray.deploy.profile.command:run",
    ),
    "demo-model": Command(
        "make the demo model (SmolLM2-135M-Instruct) once and print its directory",
        "eagleray.deploy.cli.arguments:add_demo_model",
        "eagleray.deploy.cli.main:print_demo_model",
    ),
}


SUMMARIES = {"bench": "Benchmarks."}  # of groups of commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0, `FAILED`, `MISUSED`, `INTERRUPTED` or `TERMINATED`; `SystemExit` after --help."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, words = _pick(words)
    command = COMMANDS[name]
    parser = Parser(prog=f"eagleray {name}", description=command.summary[0].upper() + command.summary[1:] + ".")
    _named(command.add_arguments)(parser)
    parser.add_argument("--debug", action="store_true", help="log more, and show where an error comes from")
    arguments = parser.parse_intermixed_args(words)
    _log_to_stderr(arguments.debug)
    with nullcontext() if command.drains else ending_on_sigterm():
        return guarded(_named(command.run), arguments)


def print_demo_model(_arguments: argparse.Namespace) -> int:
    """Run `eagleray demo-model`."""
    print(demo_model())
    return 0


def _pick(words: list[str]) -> tuple[str, list[str]]:
    """The command that the first word names, or the first two, and the words after it."""
    if words[:1] == ["help"]:  # `eagleray help serve` is `eagleray serve --help`
        words = [*words[1:], "--help"]
    top = _chooser("eagleray", "A tensor-parallel LLM inference engine on Ray.", COMMANDS)
    top.add_argument("--version", action="version", version=f"eagleray {version('eagleray')}")
    name = _chosen(top, COMMANDS, words[:1])
    if name in COMMANDS:
        return name, words[1:]
    group = {full.split()[1]: command for full, command in COMMANDS.items() if full.split()[0] == name}
    return f"{name} {_chosen(_chooser(f'eagleray {name}', SUMMARIES[name], group), group, words[1:2])}", words[2:]


def _chosen(parser: Parser, commands: Mapping[str, Command], words: list[str]) -> str:
    """The command that the one word names; for any other word, the parser ends the program and names the nearest
    command.
    """
    names = list(dict.fromkeys(name.split()[0] for name in commands))
    if not words:
        parser.error(f"which command? {', '.join(names)}")
    if words[0].startswith("-"):
        words = [*words, names[0]]  # as if there was one: what is wrong is the option
    elif words[0] not in names:
        parser.error(f"there is no command {words[0]!r}{nearest(words[0], names)}")
    name: str = parser.parse_args(words).command
    return name


def _chooser(prog: str, description: str, commands: Mapping[str, Command]) -> Parser:
    """A parser of one word, which begins the name of one of `commands`."""
    lines = "\n".join(f"  {name:<18}{command.summary}" for name, command in commands.items())
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"commands:\n{lines}\n\n`{prog} COMMAND --help` shows what a command takes.",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    return parser


def _named(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


def guarded(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, arguments.debug)
    except SystemExit as ending:
        if ending.code not in (TERMINATED, signal.SIGTERM):  # the second is Ray's, in the middle of its start
            raise
        return _fail("ended by SIGTERM", TERMINATED, arguments.debug)
    except BrokenPipeError:  # the reader of standard output has closed it; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, OSError) as error:
        return _fail(str(error), MISUSED, arguments.debug)
    except (EngineStartError, EngineDeadError, DemoModelError, FetchError) as error:
        return _fail(str(error), FAILED, arguments.debug)
    except Exception as error:
        hint = "this is a mistake in Eagleray; --debug shows where"
        return _fail(f"{type(error).__name__}: {error} ({hint})", FAILED, arguments.debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"eagleray: {message}", file=sys.stderr)
    return code


def _log_to_stderr(debug: bool) -> None:
    logging.basicConfig(format="eagleray: %(message)s", level=logging.WARNING, handlers=[_ToStderr()])
    logging.getLogger("eagleray").setLevel(logging.DEBUG if debug else logging.INFO)


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the time: while a bar is shown there, lines are written above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)
