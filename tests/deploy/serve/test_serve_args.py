"""What a server is configured with, and what is refused."""

import argparse
import hashlib
import itertools
import os
import pickle
import re
import socket
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, cast

import pytest
import ray
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.exceptions import RayServeException

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.errors import EngineStartError
from eagleray.deploy.cli.arguments import Parser
from eagleray.deploy.serve import command
from eagleray.deploy.serve.app import build
from eagleray.deploy.serve.arguments import Site, add_serve, serve_args
from eagleray.deploy.serve.command import check_free
from eagleray.deploy.serve.config import ServeArgs, help_of, in_one_line
from support.free_port import free_port
from support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser(prog="eagleray serve")
    add_serve(parser)
    return parser.parse_args(words)


def test_texts_as_serve_run_gives_them_become_what_they_mean() -> None:
    args = ServeArgs.model_validate(
        {
            "model": "/models/x",
            "tensor_parallel_size": "2",
            "enable_prefix_caching": "false",
            "max_model_len": "100",
            "api_keys": "a,b",
            "autoscaling_config": '{"min_replicas": 0, "max_replicas": 3}',
        }
    )
    assert args.engine.tensor_parallel_size == 2
    assert args.engine.enable_prefix_caching is False
    assert args.engine.max_model_len == 100
    assert args.read_api_keys() == ["a", "b"]
    assert args.max_replicas == 3
    assert args.model_name == "x"
    assert "'a'" not in repr(args)  # nor in a log


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tensor_paralel_size": 2}, r"no such option: tensor_paralel_size; the options are .*tensor_parallel_size"),
        ({"engine": 2}, "no such option: engine"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; give a whole number from 1 to 4096"),
        ({"dtype": "int4"}, "dtype is 'int4'; choose one of"),
        ({"max_queued_requests": -1}, "^max_queued_requests is -1; give a whole number of at least 0$"),
        ({"drain_timeout_s": 0}, "^drain_timeout_s is 0; give a number above 0$"),
        (
            {"max_surge_percent": 101},
            "^max_surge_percent is 101; give a whole number from 0 to 100$",
        ),
        ({"autoscaling_config": {"max_replica": 2}}, "no such option: max_replica; the options are .*max_replicas"),
        ({"autoscaling_config": {"max_replicas": 2}, "num_replicas": 2}, "leave one out"),
    ],
)
def test_what_nobody_knows_or_cannot_be_is_refused_with_what_is_known(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ServeArgs.model_validate({"model": "/models/x"} | given)
    assert re.search(words, in_one_line(caught.value))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tensor_paralel_size": 2}, "no such option: tensor_paralel_size; the options are "),
        ({"tensor_parallel_size": "many"}, "tensor_parallel_size is 'many'; give a whole number from 1 to 4096"),
        ({"api_keys": ["sk one"]}, "one of api_keys holds white space"),
        ({}, "device is 'auto', but there is no Ray cluster to look for GPUs in"),
    ],
)
def test_what_serve_cannot_build_it_says_in_a_line_and_does_not_try_again(
    given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Serve builds from YAML: of `RayServeException` it keeps the words, any other it tries again and again."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests have started
    with pytest.raises(RayServeException) as caught:
        call_user_app_builder_with_args_if_necessary(cast(FunctionType, build), {"model": "/models/x"} | given)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_keys_of_a_file_come_on_top_and_an_empty_file_is_no_open_door(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    given = {"model": "m", "api_keys_file": str(keys)}
    assert ServeArgs.model_validate(given | {"api_keys": ["zero"]}).read_api_keys() == ["zero", "one", "two"]
    for content, words in (
        (b"\n", f"^api_keys_file {keys} holds no key; write a key on each line"),
        (b"", "holds no key"),
        (b"one\n\nsk-two or so\n", f"^line 3 of api_keys_file {keys} holds white space"),
        (b"one\n\xc3\xbc", f"^line 2 of api_keys_file {keys} holds white space or characters that no header may have"),
        (b"\xff", f"^api_keys_file {keys} cannot be read: it is not UTF-8; name a text file with a key on each line"),
    ):
        keys.write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            ServeArgs.model_validate(given | {"api_keys": ["zero"]}).read_api_keys()
        assert "two" not in str(caught.value)
    for missing, cause in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"^api_keys_file {missing} cannot be read: {cause}; name a text file"):
            ServeArgs.model_validate({"model": "m", "api_keys_file": str(missing)}).read_api_keys()
    with pytest.raises(ValueError, match="is empty"):
        ServeArgs.model_validate({"model": "m", "api_keys": [""]}).read_api_keys()
    with pytest.raises(ValueError, match=r"^one of api_keys holds white space") as caught:
        ServeArgs.model_validate({"model": "m", "api_keys": ["one two"]}).read_api_keys()
    assert "two" not in str(caught.value)


def test_keys_come_from_the_environment_and_are_in_nothing_that_others_see(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EAGLERAY_API_KEY", "sk-first,sk-second")
    args, _ = serve_args(parsed(str(model_dir), "--guard-all"))
    assert args.read_api_keys() == ["sk-first", "sk-second"]
    assert caplog.text == ""
    assert "EAGLERAY_API_KEY" not in os.environ, "or Ray's processes would have it"
    bare, digests = args.without_keys()
    assert list(digests) == [hashlib.sha256(key).digest() for key in (b"sk-first", b"sk-second")]
    assert bare.guard_all
    for seen in (pickle.dumps((bare, digests)), repr(bare).encode(), bare.model_dump_json().encode()):
        assert b"sk-" not in seen
    with pytest.raises(ValueError, match="one of api_keys is empty"):
        ServeArgs.model_validate({"model": "m", "api_keys": ["sk-one", ""]}).without_keys()


def test_a_key_on_the_command_line_is_taken_with_a_warning(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert serve_args(parsed(str(model_dir), "--api-key", "sk-one"))[0].read_api_keys() == ["sk-one"]
    assert "--api-key shows in `ps` to every user of this machine; EAGLERAY_API_KEY or" in caplog.text


def test_without_keys_there_is_nothing_to_guard_with(model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"^guard_all asks for keys, and there are none; give api_keys_file"):
        serve_args(parsed(str(model_dir), "--guard-all"))


def test_the_help_names_what_is_guarded_on_request_and_what_stays_open() -> None:
    """As `test_serve_host` finds it."""
    guarded, _, open_ = help_of("guard_all").partition("; then only ")
    assert re.findall(r"/\w+", guarded) == ["/metrics"]
    assert re.findall(r"/\w+", open_) == ["/health"]
    assert open_.endswith("need none")


NO_PLACEMENT = r"^placement_timeout_s has no effect on a server: Ray Serve .*; leave it out$"


def test_a_limit_that_serve_would_not_keep_is_refused_wherever_it_is_given(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it be the default; Python's own configurations all have that."""
    with pytest.raises(ValidationError) as caught:
        ServeArgs.model_validate({"model": "m", "placement_timeout_s": 60})
    assert re.search(NO_PLACEMENT, in_one_line(caught.value))
    with pytest.raises(ValidationError) as caught:
        ServeArgs.model_validate({"engine": EngineConfig(model="m", placement_timeout_s=5)})
    assert re.search(NO_PLACEMENT, in_one_line(caught.value))
    assert ServeArgs.model_validate({"engine": EngineConfig(model="m")}).engine.placement_timeout_s == 60
    with pytest.raises(ValueError, match=NO_PLACEMENT):
        serve_args(parsed(str(model_dir), "--placement-timeout-s", "60"))
    with pytest.raises(ValidationError) as caught:
        ServeArgs.model_validate({"model": "m", "nothing": 1})
    assert "placement_timeout_s" not in in_one_line(caught.value)
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "--placement-timeout-s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        ({}, ("*",)),
        ({"allowed_origins": "*"}, ("*",)),
        (
            {"allowed_origins": "https://a.example, http://localhost:3000"},
            ("https://a.example", "http://localhost:3000"),
        ),
        ({"allowed_origins": ["https://[::1]:81", "null"]}, ("https://[::1]:81", "null")),
        ({"allowed_origins": []}, ()),
        ({"allowed_origins": ""}, ()),
    ],
)
def test_origins_are_any_or_those_that_are_named(given: dict[str, Any], origins: tuple[str, ...]) -> None:
    assert ServeArgs.model_validate({"model": "m"} | given).allowed_origins == origins


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/", "https://A.example", "https://a, ,https://b"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is not an origin; give scheme, host and port"):
        ServeArgs.model_validate({"model": "m", "allowed_origins": origin})


def test_the_command_line_says_the_same(model_dir: Path) -> None:
    words = ["--tp", "2", "--api-key", "a", "--api-key", "b", "--num-replicas", "2", "--engine-seed", "7"]
    words += ["--allowed-origins", "https://a.example,https://b.example"]
    args, site = serve_args(parsed(str(model_dir), *words, "--port", "81", "--route-prefix", "/llm"))
    assert args.engine.tensor_parallel_size == 2
    assert args.engine.seed == 7
    assert args.num_replicas == 2
    assert args.read_api_keys() == ["a", "b"]
    assert args.allowed_origins == ("https://a.example", "https://b.example")
    assert args.model_name == model_dir.name
    assert site.url() == "http://127.0.0.1:81/llm"
    assert site.url("::1") == "http://[::1]:81/llm"


def test_the_models_sampling_can_be_left_alone(model_dir: Path) -> None:
    for words, expected in (([], "auto"), (["--generation-config", "none"], "none")):
        assert serve_args(parsed(str(model_dir), *words))[0].generation_config == expected
    with pytest.raises(ValueError, match=r"^generation_config is 'mine'; give auto or none$"):
        build({"model": str(model_dir), "generation_config": "mine"})
    with pytest.raises(SystemExit):
        parsed(str(model_dir), "--generation-config", "mine")


def test_a_file_is_told_of_null_and_the_command_line_of_none(model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"^max_model_len is 0; give a whole number from 1 to 4194304, or null$"):
        build({"model": str(model_dir), "max_model_len": 0})
    with pytest.raises(ValueError, match=r"^max_model_len is 'a'; give a whole number from 1 to 4194304, or null$"):
        build({"model": str(model_dir), "max_model_len": "a"})
    with pytest.raises(ValueError, match=r"^max_model_len is 0; give a whole number from 1 to 4194304, or None$"):
        serve_args(parsed(str(model_dir), "--max-model-len", "0"))


def test_the_command_line_refuses_in_one_line(model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"^max_body_bytes is '0'; give a whole number of at least 1$"):
        serve_args(parsed(str(model_dir), "--max-body-bytes", "0"))
    with pytest.raises(ValueError, match=r"^api_keys_file /nowhere/keys cannot be read: No such file"):
        serve_args(parsed(str(model_dir), "--api-keys-file", "/nowhere/keys"))
    for flag, value, words in (
        ("--port", "70000", "port is 70000; give a whole number from 1 to 65535"),
        ("--route-prefix", "llm", "route_prefix is 'llm'; give one that begins with /"),
        ("--route-prefix", "/llm/", "route_prefix is '/llm/'; give one that begins with /"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            serve_args(parsed(str(model_dir), flag, value))


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.1", "that address is not this machine's: give --host one that is, or 0.0.0.0"),  # RFC 5737: nobody's
        ("nobody.invalid", "; give --host an address of this machine, or 0.0.0.0"),
    ],
)
def test_an_address_of_another_machine_is_not_a_matter_of_ports(host: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^cannot listen at {re.escape(host)}:8000 ") as caught:
        check_free(Site(host, 8000, "eagleray", "/"))
    assert words in str(caught.value)
    assert "--port" not in str(caught.value)


def test_a_port_that_is_taken_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^cannot listen at 127\.0\.0\.1:{port} .*; choose another --port$"):
            check_free(Site("127.0.0.1", port, "eagleray", "/"))


def test_a_server_that_never_answers_is_named_however_long_a_sleep_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that began before the end of the time may end long after it."""
    clock = itertools.chain([0.0, 0.0, 0.0], itertools.repeat(100.0))
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineStartError, match=f"^the model started, but {url}/health says: .*refused"):
        command._ask(url, 10.0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{", "'{' is not JSON (Expecting property name enclosed in double quotes at character 2); give it as "),
        ("", "'' is not JSON (Expecting value at character 1); give it as "),
        ("5", "'5' is not an object; give it as "),
        ("[1]", "'[1]' is not an object; give it as "),
        ('{"max_replicas": 0}', "max_replicas: Input should be greater than 0"),
        ('{"min_replicas": 3}', "max_replicas (1) must be greater than or equal to min_replicas (3)!"),
    ],
)
def test_scaling_that_cannot_be_is_named_with_an_example(model_dir: Path, given: str, words: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"autoscaling_config: {words}")) as caught:
        serve_args(parsed(str(model_dir), "--autoscaling-config", given))
    assert "\n" not in str(caught.value)
    if words.endswith("give it as "):
        example = str(caught.value).rpartition("give it as ")[2].strip("'")
        assert serve_args(parsed(str(model_dir), "--autoscaling-config", example))[0].max_replicas == 4
