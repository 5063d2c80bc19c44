"""The command-line arguments of `generate` and `chat`, and the parser of all commands. Light to import, so that
`--help` and a mistyped option answer at once.
"""

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.frontend.generation_config import CHOICE_HELP, CHOICES, DEFAULTED, chosen_defaults
from eagleray.cluster.options import options
from eagleray.cluster.runtime.resolve import check_model, found
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.cli.options import add_options, given

SAMPLING_NOTES = {  # what is so on the command line alone
    "max_tokens": "none allows as many as the model holds",
    "seed": "without one, it is drawn, or derived from --engine-seed",
    "bad_words": "may be given several times",
    "stop": "may be given several times",
    "logprobs": "shown by --json",
    "prompt_logprobs": "shown by --json",
    "detokenize": "without it only --json has something to show",
}
NOT_IN_CHAT = {"n", "logprobs", "prompt_logprobs", "detokenize"}
GENERATE_DEFAULTS = {"max_tokens": 256}
CHAT_DEFAULTS = {"max_tokens": None}
MODEL_FIRST = {name: getattr(SamplingParams(), name) for name in DEFAULTED}  # and this where it does not say
CHAT_SAMPLING = MODEL_FIRST | {"temperature": 0.7}

SYSTEM = "a system message that every conversation begins with"
ENGINE_RENAMED = {"seed": "engine_seed"}  # --seed is the requests' own

MISSING = "the following arguments are required:"
UNKNOWN_OPTION = re.compile(r"unrecognized arguments: .*?(--[^\s=]+)")


def nearest(word: str, names: Sequence[str]) -> str:
    """`; did you mean …?`, if one of the names is like it."""
    near = get_close_matches(word, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> Any:
        if message in (f"{MISSING} --model/-m", f"{MISSING} MODEL"):
            message += "; demo is a small model to begin with"
        if found := UNKNOWN_OPTION.match(message):
            if found[1] == "--model" and any(action.dest == "model" for action in self._actions):
                message += f"; name the model without it: {self.prog} MODEL"
            else:
                message += nearest(found[1], [name for name in self._option_string_actions if name.startswith("--")])
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.HelpFormatter):
    """Help texts in one column that leaves room for long option names; paragraphs of the description stay apart."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(_Formatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray generate`."""
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("prompts", nargs="*", metavar="PROMPT", help="a prompt; without any, see --file")
    prompts.add_argument(
        "--file",
        "-f",
        type=Path,
        metavar="PATH",
        help='file with prompts (- or nothing: standard input), one a line or as JSON lines {"prompt": "…"}, '
        '{"prompt": [token ids]} or {"messages": [{"role": "user", "content": "…"}]}',
    )
    form = prompts.add_mutually_exclusive_group()
    form.add_argument("--chat", dest="chat", action="store_true", default=None, help="put prompts in the chat template")
    form.add_argument(
        "--raw",
        dest="chat",
        action="store_false",
        default=None,
        help="take prompts as they are (default: chat if it can)",
    )
    prompts.add_argument("--system", metavar="TEXT", help=f"{SYSTEM}; only with a chat template")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print one JSON object for each prompt, in the prompts' order"
    )
    add_engine(parser)
    _add_sampling(parser, options(SamplingParams), GENERATE_DEFAULTS, MODEL_FIRST)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray chat`."""
    talk = parser.add_argument_group("conversation")
    talk.add_argument("--system", metavar="TEXT", help=SYSTEM)
    add_engine(parser)
    _add_sampling(parser, options(SamplingParams).keys() - NOT_IN_CHAT, CHAT_DEFAULTS, CHAT_SAMPLING)


def add_demo_model(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray demo-model`: none of its own."""


def add_engine(
    parser: argparse.ArgumentParser,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    positional: bool = False,
    hidden: Collection[str] = (),
) -> None:
    """The model, as an option or as a word of its own, and every option of the engine.

    `defaults` and `hidden` as `add_options`'.
    """
    engine = parser.add_argument_group("engine")
    name: tuple[str, ...] = ("--model", "-m")
    required: dict[str, Any] = {"required": True, "metavar": "MODEL"}
    if positional:
        name, required = ("model",), {"metavar": "MODEL"}
    engine.add_argument(*name, help=options(EngineConfig)["model"].text, **required)
    add_options(
        engine,
        EngineConfig,
        renamed=ENGINE_RENAMED,
        aliases={"tensor_parallel_size": "--tp"},
        defaults=defaults,
        hidden=hidden,
    )


def add_generation_config(parser: "argparse._ArgumentGroup") -> None:
    """Whose sampling defaults hold where a request, or the command line, says nothing."""
    parser.add_argument(
        "--generation-config", choices=CHOICES, default="auto", help=f"{CHOICE_HELP} (default: %(default)s)"
    )


def _add_sampling(
    parser: argparse.ArgumentParser, names: Collection[str], defaults: Mapping[str, Any], fallback: Mapping[str, Any]
) -> None:
    """`fallback` is what holds for options that the model might have set, and did not."""
    sampling = parser.add_argument_group("sampling")
    add_generation_config(sampling)
    add_options(sampling, SamplingParams, names, notes=SAMPLING_NOTES, defaults=defaults, model_first=fallback)


def check_sampling(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` for sampling options out of range, before the model is looked for."""
    SamplingParams(**given(SamplingParams, arguments))


def sampling_params(
    arguments: argparse.Namespace, folder: Path, fallback: Mapping[str, Any] = MODEL_FIRST
) -> SamplingParams:
    """The options that were given, else the defaults of the model in `folder` if they are wanted, else `fallback`.

    Raises `ValueError` for values out of range, and for a generation_config.json that is wrong.
    """
    asked = given(SamplingParams, arguments)
    return SamplingParams(**{**fallback, **chosen_defaults(folder, arguments.generation_config, asked), **asked})


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The engine's options; makes the demo model if asked for it, and fetches one of the hub.

    Raises `ValueError` for values out of range and for a model that could not be run.
    """
    config = found(EngineConfig(**given(EngineConfig, arguments, ENGINE_RENAMED)))
    check_model(config)
    return config
