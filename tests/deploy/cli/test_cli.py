"""The command line: what it accepts, what it says about itself, and how it complains."""

import argparse
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.errors import EngineDeadError
from eagleray.cluster.options import option, options
from eagleray.cluster.runtime.resolve import folder_of
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.cli import main as cli
from eagleray.deploy.cli.arguments import (
    CHAT_SAMPLING,
    ENGINE_RENAMED,
    GENERATE_DEFAULTS,
    NOT_IN_CHAT,
    SAMPLING_NOTES,
    Parser,
    add_chat,
    add_generate,
    engine_config,
    sampling_params,
)
from eagleray.deploy.cli.options import add_options, given


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser(prog="eagleray generate")
    add_generate(parser)
    return parser.parse_intermixed_args(["--model", "somewhere", *words])


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """What was written: one line on standard error and nothing else."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


def test_every_field_is_an_option_with_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["generate", "--help"])
    shown = capsys.readouterr().out.split()
    names = {field.name for field in fields(SamplingParams)}
    names |= {ENGINE_RENAMED.get(field.name, field.name) for field in fields(EngineConfig)}
    assert {flag(name) for name in names} <= {word.strip("[],") for word in shown}
    for owner in (SamplingParams, EngineConfig):
        assert set(options(owner)) == {field.name for field in fields(owner)}
    text = " ".join(shown)
    assert all(" ".join(each.text.split()) in text for each in options(EngineConfig).values())
    assert all(note in text for note in SAMPLING_NOTES.values())


OF_TWO_KINDS = {  # flags that two commands take in two ways
    "--input-len": "of all prompts, or on average",
    "--output-len": "of all answers, or on average",
    "--max-model-len": "of an engine, or of a server elsewhere",
    "--model": "of an engine, or of a server elsewhere",
    "--seed": "of a request, or of a whole load",
    "--system": "with a chat template, which `chat` always has",
    "--ignore-eos": "of our own engine, or of a server that may not know it",
}


def helps() -> dict[str, set[str]]:
    """What all commands say of each option, without its default, which may be the command's own."""
    said: dict[str, set[str]] = {}
    for name, command in cli.COMMANDS.items():
        parser = Parser(prog=name)
        cli._named(command.add_arguments)(parser)
        for action in parser._actions:
            if action.option_strings and action.help is not argparse.SUPPRESS:
                text = parser._get_formatter()._expand_help(action)
                said.setdefault(action.option_strings[0], set()).add(text.partition(" (default: ")[0])
    return said


def test_an_option_is_explained_in_the_same_words_by_every_command() -> None:
    differing = {name for name, texts in helps().items() if len(texts) > 1}
    assert differing == set(OF_TWO_KINDS)


def test_a_help_text_can_be_read_by_itself() -> None:
    """It does not go on where the option's name stops, and does not point at the one before it."""
    dependent = ("of ", "where to ", "as ", "those ", "what all its", "batches before", "requests before those")
    assert not [text for texts in helps().values() for text in texts if text.startswith(dependent)]


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(default: {EngineConfig(model='').max_num_seqs})" in shown
    assert f"(default: {GENERATE_DEFAULTS['max_tokens']})" in shown


def test_chat_takes_what_makes_sense_in_a_conversation(tmp_path: Path) -> None:
    parser = Parser()
    add_chat(parser)
    params = sampling_params(parser.parse_args(["--model", "x"]), tmp_path, CHAT_SAMPLING)
    assert params == SamplingParams(max_tokens=None, temperature=0.7)
    for name in NOT_IN_CHAT:
        with pytest.raises(SystemExit):
            parser.parse_args(["--model", "x", flag(name), "1"])


def test_options_not_given_leave_the_dataclass_its_defaults(tmp_path: Path) -> None:
    arguments = parsed("hello")
    assert given(EngineConfig, arguments, ENGINE_RENAMED) == {"model": "somewhere"}
    assert sampling_params(arguments, tmp_path) == SamplingParams(max_tokens=GENERATE_DEFAULTS["max_tokens"])


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--top-k 5", "top_k", 5),
        ("--presence-penalty -0.5", "presence_penalty", -0.5),
        ("--max-tokens none", "max_tokens", None),
        ("--max-tokens None", "max_tokens", None),
        ("--seed 7", "seed", 7),
        ("--ignore-eos", "ignore_eos", True),
        ("--no-skip-special-tokens", "skip_special_tokens", False),
        ("--stop one --stop two", "stop", ["one", "two"]),
        ("--stop-token-ids 1,2", "stop_token_ids", [1, 2]),
        ("--logit-bias 5=-100,6=1.5", "logit_bias", {5: -100.0, 6: 1.5}),
    ],
)
def test_a_sampling_option_is_read(words: str, name: str, value: object, tmp_path: Path) -> None:
    assert getattr(sampling_params(parsed(*words.split()), tmp_path), name) == value


def test_the_model_has_its_say_where_no_option_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 5}')
    with caplog.at_level(logging.INFO, "eagleray"):
        params = sampling_params(parsed("--top-p", "1"), tmp_path, CHAT_SAMPLING)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.2, 1.0, GENERATE_DEFAULTS["max_tokens"])
    assert caplog.messages == ["sampling defaults of the model's generation_config.json: temperature 0.2"]
    params = sampling_params(parsed("--generation-config", "none"), tmp_path)
    assert (params.temperature, params.top_p) == (1.0, 1.0)


def test_engine_options_are_read() -> None:
    words = "--tp 2 --engine-seed 3 --seed 4 --dtype bfloat16 --no-enable-prefix-caching --kv-cache-bytes 4096"
    assert given(EngineConfig, parsed(*words.split()), ENGINE_RENAMED) == {
        "model": "somewhere",
        "tensor_parallel_size": 2,
        "seed": 3,
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
        "kv_cache_bytes": 4096,
    }


def test_a_system_message_without_a_template_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", "demo", "hello", "--raw", "--system", "x"]) == 2
    assert "--system needs the chat template" in complaint(capsys)


def test_prompts_may_stand_between_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("first", "--tp", "2", "second", "--json", "third").prompts == ["first", "second", "third"]
    assert cli.main(["generate", "first", "--model", "/no/such/model", "second"]) == cli.MISUSED
    assert "/no/such/model" in complaint(capsys)


def test_a_field_of_a_type_without_a_reader_is_refused() -> None:
    @dataclass
    class Odd:
        when: complex = option(1j, "?")

    with pytest.raises(TypeError, match="complex"):
        add_options(Parser(), Odd)


USAGE_ERRORS = [
    ("", "which command?"),
    ("generat", "'generat'"),
    ("generate hello", "--model"),
    ("generate --model demo hello --tempo 3", "--tempo"),
    ("generate --model demo hello --temp 3", "--temp"),
    ("generate --model demo hello --top-k many", "'many'"),
    ("generate --model demo hello --dtype int3", "'int3'"),
    ("generate --model demo hello --logit-bias 5", "'5'"),
    ("generate --model demo hello --stop-token-ids 1,x", "'1,x'"),
    ("generate --model demo hello --chat --raw", "--chat"),
    ("chat --model demo hello", "hello"),
]


@pytest.mark.parametrize(("words", "named"), USAGE_ERRORS)
def test_a_usage_error_is_one_line_that_points_to_the_help(
    words: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words.split())
    assert caught.value.code == cli.MISUSED
    message = complaint(capsys)
    assert named in message
    assert "--help" in message


BAD_VALUES = [
    ("generate --model demo hello --temperature -1", "temperature is -1.0"),
    ("generate --model demo hello --tp 0", "tensor_parallel_size is 0"),
    ("generate --model demo hello --gpu-memory-utilization 2", "gpu_memory_utilization is 2.0"),
    ("generate --model /no/such/model hello", "/no/such/model"),
    ("generate --model demo --file /no/such/file", "/no/such/file"),
    ("generate --model demo --file prompts.txt hello", "prompts.txt"),
    ("chat --model /no/such/model", "/no/such/model"),
]


@pytest.mark.parametrize(("words", "named"), BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_it(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == cli.MISUSED
    assert named in complaint(capsys)


def test_a_model_that_cannot_be_cut_so_often_is_refused_before_anything_starts(
    demo_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--model", str(demo_model_dir), "--tp", "64", "hello"]) == cli.MISUSED
    assert "64" in complaint(capsys)


def test_a_directory_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--model", str(tmp_path)]) == cli.MISUSED
    assert "config.json" in complaint(capsys)


def test_no_prompt_at_all_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/null") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert cli.main(["generate", "--model", "demo"]) == cli.MISUSED
    assert "there is no prompt" in complaint(capsys)


def fails_with(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(_: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("top_p is 7"), cli.MISUSED, "top_p is 7"),
        (EngineDeadError("rank 1: gone"), cli.FAILED, "rank 1: gone"),
        (KeyboardInterrupt(), cli.INTERRUPTED, "interrupted"),
        (KeyError("x"), cli.FAILED, "KeyError: 'x'"),
    ],
)
def test_an_exception_becomes_one_line_and_an_exit_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.guarded(fails_with(error), argparse.Namespace(debug=False)) == code
    assert words in complaint(capsys)


def test_logs_go_to_what_standard_error_is_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert cli.main(["generate", "--model", "/no/such/model", "hello"]) == cli.MISUSED
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    logging.getLogger("eagleray.x").warning("look")
    assert later.getvalue() == "eagleray: look\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    cli.guarded(fails_with(KeyError("x")), argparse.Namespace(debug=True))
    assert "Traceback" in capsys.readouterr().err


def test_demo_model_prints_the_directory(demo_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo-model"]) == 0
    assert capsys.readouterr().out == f"{demo_model_dir}\n"


def test_engine_config_finds_the_demo_model(demo_model_dir: Path) -> None:
    arguments = parsed()
    arguments.model = "demo"
    assert folder_of(engine_config(arguments)) == demo_model_dir


@pytest.mark.parametrize(
    ("words", "same"),
    [("help", "--help"), ("help serve", "serve --help"), ("help bench serve", "bench serve --help")],
)
def test_help_is_a_word_too(words: str, same: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for given_words in (words, same):
        with pytest.raises(SystemExit, match="0"):
            cli.main(given_words.split())
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert shown[0].out.startswith("usage: eagleray")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "eagleray: error: which command? generate, chat, serve, batch, bench, profile, demo-model"),
        ("serv x", "eagleray: error: there is no command 'serv'; did you mean serve?"),
        ("generat --help", "eagleray: error: there is no command 'generat'; did you mean generate?"),
        ("help chatt", "eagleray: error: there is no command 'chatt'; did you mean chat?"),
        ("xyz", "eagleray: error: there is no command 'xyz' (see"),
        ("bench", "eagleray bench: error: which command? latency, throughput, serve"),
        ("bench latncy", "eagleray bench: error: there is no command 'latncy'; did you mean latency?"),
        ("generate -m x --temprature 1", "unrecognized arguments: --temprature; did you mean --temperature?"),
        ("generate hi", "required: --model/-m; demo is a small model to begin with"),
        ("serve", "required: MODEL; demo is a small model to begin with"),
        ("serve x --model demo", "--model demo; name the model without it: eagleray serve MODEL"),
    ],
)
def test_what_is_mistyped_is_told_with_what_is_near(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words.split())
    assert message in complaint(capsys)


def imported_by(words: str) -> set[str]:
    """Modules in a process that ran the command line."""
    script = (
        "import sys\nfrom eagleray.deploy.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", script, *words.split()], capture_output=True, text=True, timeout=60)
    assert "eagleray" in run.stdout + run.stderr
    return set(run.stderr.split())


@pytest.mark.parametrize("words", ["--version", "--help", "generate --help", "chat --help"])
def test_asking_what_there_is_imports_nothing_heavy(words: str) -> None:
    assert not imported_by(words) & {"torch", "ray", "transformers", "numpy", "rich"}


@pytest.mark.parametrize("command", ["generate hello", "chat"])
def test_a_bad_value_is_reported_before_anything_slow_is_imported(command: str) -> None:
    assert not imported_by(f"{command} --model /no/such/model") & {"torch", "ray", "transformers"}
