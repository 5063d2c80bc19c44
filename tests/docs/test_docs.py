"""What the documentation says can be done: commands parse, names exist, examples run, tables are those of the code."""

import asyncio
import builtins
import re
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from eagleray.cluster import async_llm
from eagleray.cluster.config import EngineConfig
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.sampling_params import MAX_BAD_WORDS, MAX_N
from eagleray.deploy.cli import main as cli
from eagleray.deploy.cli.arguments import Parser
from eagleray.deploy.openai import field_types, limits
from eagleray.deploy.serve.config import ServeArgs, known_names
from eagleray.deploy.serve.environment import FASTER_STREAMS, HAPROXY
from eagleray.deploy.serve.metrics import PARTS
from eagleray.workers.protocol.config import HOST_KV_CACHE_BYTES
from support.defined_names import DefinedNames
from support.doc_pages import PAGES, ROOT, CommandLine, blocks, commands, links, name_of, names, programs
from support.local_engine import LocalEngine
from support.tiny_model import END_ID, VOCAB_SIZE, write_tiny_model

DEFAULTS = EngineConfig(model="m")
SHELL = sorted({(command.where, command.words) for command in commands()})
UNCHECKED = {  # programs of others, of which no test here runs or parses a line; files and options of ours in it are
    "curl": "asks a server that runs",
    "docker": "needs a daemon and, to build, the network; the image's words for `eagleray` are parsed",
    "echo": "writes what another program reads",
    "kubectl": "needs a cluster; tests/deploy/manifests reads the files",
    "pip": "installs; the extras that it names are looked up",
    "pre-commit": "is a tool of git",
    "ray": "needs machines; what is to run on them is parsed",
}
ELSEWHERE = {  # files and folders that are not of this repository
    "config.json": "of a model",
    "generation_config.json": "of a model",
    "tokenizer.json": "of a model",
    "results.jsonl.partial": "of a batch job",
    "results.jsonl.partial.json": "of a batch job",
    "admin.sock": "of HAProxy",
    "metrics.sock": "of HAProxy",
    "eagleray-UID/": "of Ray",
    "eagleray-*/hub": "of an engine",
    "ray/session_*/": "of Ray",
    "sockets/": "of Ray",
    "logs/": "of Ray",
    "dashboard.py": "a process of Ray",
    "monitor.py": "a process of Ray",
    "models/NAME.py": "to be written",
    "workers/attention/NAME.py": "to be written",
    "Qwen/Qwen3-0.6B": "of the hub",
    "nvidia.com/gpu": "of Kubernetes",
    "__init__.py": "of every package",
}
OTHERS_OPTIONS = {"--debug": "of every command, which `main` adds"}
OTHERS_NAMES = {  # identifiers that are not in our source
    "PIP_EXTRA_INDEX_URL": "of pip",
    "PIP_FIND_LINKS": "of pip",
    "batch_req_n": "stands for `batch_req_1` and so on",
    "downscale_delay_s": "of Ray Serve",
    "is_cuda": "of tensors; named so that nobody uses it",
    **{f"eagleray_{part}_seconds": "is made of `PARTS`" for part in PARTS},
}


def of_server(name: str) -> int:
    """The default of one of the server's own options."""
    return int(ServeArgs.model_fields[name].default)


@pytest.fixture(autouse=True)
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eagleray` reads its arguments and does nothing else."""
    monkeypatch.setattr(cli, "guarded", lambda run, arguments: 0)
    monkeypatch.setattr(cli, "_log_to_stderr", lambda debug: None)


@pytest.mark.parametrize(("where", "words"), SHELL, ids=[f"{where} {' '.join(words)}"[:90] for where, words in SHELL])
def test_a_command_is_one_that_there_is(where: str, words: tuple[str, ...]) -> None:
    check(CommandLine(where, words))


@pytest.mark.parametrize(
    "wrong",
    [
        "eagleray generate --modle demo hello",
        "eagleray serv demo",
        "eagleray bench latency --model demo --batch-size many",
        "make everything",
        'make test TESTS="tests/nowhere"',
        'make test THESE="tests/docs"',
        "make bench BENCH=nowhere",
        "python tests/bench/nowhere.py",
        "python tests/bench/soak.py --hours 5",
        "python -m eagleray.nowhere",
        "serve run eagleray.deploy.serve.app:build model=demo tensor_parallel=4",
        "serve run deploy/manifests/nowhere.yaml",
        'pip install "eagleray[everything]"',
        "docker run --gpus all eagleray serve demo --hots 0.0.0.0",
        "ray exec deploy/manifests/cluster.yaml '~/eagleray/bin/eagleray serve demo --hots 0.0.0.0'",
        "deploy/manifests/submit.sh --address http://head:8265 -- in.jsonl out.jsonl --model demo --replica 2",
        "frobnicate",
    ],
)
def test_a_command_that_there_is_not_is_found(wrong: str) -> None:
    (words,) = programs(wrong)
    with pytest.raises((AssertionError, SystemExit)):
        check(CommandLine("here", tuple(words)))


def check(command: CommandLine) -> None:
    """Raise `AssertionError`, or `SystemExit` as argparse does, for a line that cannot be right."""
    program, *words = command.words
    program = program.removeprefix(".venv/bin/")
    assert program in CHECKS or program in UNCHECKED, (
        f"{command.where}: {program} is not known here; check it or list it"
    )
    for word in command.words:
        if word.startswith(("deploy/", "tests/", "docs/")) and " " not in word:
            assert (ROOT / word).exists(), f"{command.where}: there is no {word}"
    if program in CHECKS:
        CHECKS[program](words)


def check_eagleray(words: list[str]) -> None:
    try:
        code: object = cli.main(words)
    except SystemExit as ending:
        code = ending.code
    assert code == 0, f"eagleray {' '.join(words)} is not understood"


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, value = word.partition("=")
        if is_variable:
            assert re.search(rf"^{name} \?=", text, re.MULTILINE), f"the Makefile has no variable {name}"
            for path in filter(lambda each: each.startswith("tests/"), value.split()):
                assert (ROOT / path).exists(), f"there is no {path}"
            if name == "BENCH":
                check_bench(value)
        else:
            assert re.search(rf"^{name}:", text, re.MULTILINE), f"the Makefile has no target {name}"


def check_bench(scripts: str) -> None:
    for script in scripts.split():
        assert (ROOT / f"tests/bench/{script}.py").exists(), f"there is no benchmark {script}"


def test_the_benchmarks_that_make_runs_are_there() -> None:
    found = re.search(r"^BENCH \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    check_bench(found[1])


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert find_spec(words[1]) is not None, f"there is no module {words[1]}"
        return
    source = (ROOT / words[0]).read_text()
    source += "".join(
        (ROOT / f"tests/support/{name}.py").read_text() for name in re.findall(r"from support\.(\w+)", source)
    )
    for option in (word for word in words if word.startswith("--")):
        assert f'add_argument("{option}"' in source, f"{words[0]} has no option {option}"


def check_serve(words: list[str]) -> None:
    assert words[0] == "run"
    if words[1].endswith(".yaml"):
        assert (ROOT / words[1]).exists()
        return
    module, _, function = words[1].partition(":")
    assert f"def {function}(" in (ROOT / f"{module.removeprefix('eagleray.').replace('.', '/')}.py").read_text()
    for word in words[2:]:
        assert word.partition("=")[0] in known_names(), word


def check_submit(words: list[str]) -> None:
    check_eagleray(["batch", *words[words.index("--") + 1 :]])


def check_docker(words: list[str]) -> None:
    if words[0] == "run":
        check_eagleray(words[words.index("eagleray") + 1 :])


def check_ray(words: list[str]) -> None:
    for word in words:
        if "/eagleray " in word:
            check_eagleray(programs(word)[0][1:])


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for extra in re.findall(r"eagleray\[(\w+)\]", word):
            assert extra in extras, f"there is no extra {extra}"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "deploy/manifests/submit.sh": check_submit,
    "docker": check_docker,
    "eagleray": check_eagleray,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "ray": check_ray,
    "serve": check_serve,
}


@cache
def all_options() -> frozenset[str]:
    found: set[str] = set()
    for name, command in cli.COMMANDS.items():
        parser = Parser(prog=name)
        cli._named(command.add_arguments)(parser)
        found.update(parser._option_string_actions)
    return frozenset(found)


PACKAGES = ("cluster", "deploy", "models", "parallel", "workers")


@cache
def packages() -> DefinedNames:
    return DefinedNames(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@cache
def of_tests() -> DefinedNames:
    return DefinedNames(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))


@cache
def manifests() -> set[str]:
    """The words of the files for deployments, and of how this is installed; comments left out."""
    files = [*(ROOT / "deploy/manifests").iterdir(), ROOT / "Makefile", ROOT / "pyproject.toml"]
    lines = (line for file in files if file.suffix != ".md" for line in file.read_text().splitlines())
    return {word for line in lines if not line.lstrip().startswith("#") for word in re.findall(r"\w+", line)}


NAMED = sorted({(page, code) for page, code in names()})


@pytest.mark.parametrize("page", [name_of(page) for page in PAGES])
def test_what_a_page_names_is_there(page: str) -> None:
    missing = [code for where, code in NAMED if where == page and not is_there(code, page)]
    assert not missing, f"{page} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=map(name_of, PAGES))
def test_links_of_a_page_lead_to_files_of_the_repository(page: Path) -> None:
    """So that they work for those who read it there; the site is checked as it is built."""
    missing = [str(link) for link in links(page) if not link.exists()]
    assert not missing, f"{name_of(page)} leads to {missing}"


@pytest.mark.parametrize(
    "wrong",
    [
        "cluster/core/shedule.py",
        "tests/nowhere/",
        "--max-nmu-seqs",
        "max_nmu_seqs",
        "eagleray bench nothing",
        "make all",
        "Scheduler._make_rooms",
        "Scheduler.block_size_of_nothing",
        "Shedule.stats",
        "llm.get_defaults()",
        "eagleray.cluster.nowhere",
        "max_nmu_seqs(8)",
        "_prempt",
        "KIND",
        "Sit",
        "DELIBERATE_ERRORS",
        "DefinedNames",
    ],
)
def test_a_name_of_nothing_is_found(wrong: str) -> None:
    """Or of tests alone, on a page for users."""
    assert not is_there(wrong, "docs/tuning.md")


@pytest.mark.parametrize(
    "right", ["LLM.generate(prompts)", "Scheduler._make_room", "EngineConfig.max_num_seqs", "KINDS"]
)
def test_a_name_of_something_passes(right: str) -> None:
    assert is_there(right, "docs/tuning.md")


def test_pages_for_those_who_change_the_code_may_name_what_tests_define() -> None:
    assert is_there("DELIBERATE_ERRORS", "docs/howto/model.md")


def test_no_exception_is_left_that_no_page_needs() -> None:
    unused = {*ELSEWHERE, *OTHERS_OPTIONS, *OTHERS_NAMES}.difference(code for _, code in NAMED)
    unrun = {*UNCHECKED, *CHECKS}.difference(words[0].removeprefix(".venv/bin/") for _, words in SHELL)
    assert (unused, unrun) == (set(), set())


def is_there(code: str, page: str) -> bool:
    """Whether a name, an option, a path or a command within a line is one that there is; true for all other code.

    A name in a package counts, and a word of a text in its code or of a manifest: neither comments nor docstrings.
    Pages for those who change the code may name what tests define. Single words in lower case are not looked at.
    """
    if code in ELSEWHERE or code in OTHERS_OPTIONS or code in OTHERS_NAMES:
        return True
    if code.startswith("eagleray "):
        words = code.split()[1:]
        if words[0] == "help":
            return True
        commands = cli.COMMANDS.keys() | {name.split()[0] for name in cli.COMMANDS}
        if words[0] not in commands or (words[0] in ("bench",) and " ".join(words[:2]) not in {*commands, "bench"}):
            return False
        return all(word in all_options() for word in words if word.startswith("--"))
    if code.startswith("make "):
        return bool(re.search(rf"^{code.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if re.fullmatch(r"--[a-z][\w-]*( \S+)?", code):
        return code.split()[0] in all_options()
    if re.fullmatch(r"[\w-][\w./*-]*/|[\w-][\w./-]*/[\w.-]+|[\w.-]+\.(py|md|ya?ml|sh|html|json)", code):
        return (ROOT / code).exists() or (ROOT / "deploy" / "manifests" / code).exists()
    if found := re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(\(.*\))?", code):
        *owners, name = found[1].split(".")
        if owners:
            return has(owners, name)
        if found[2] is not None or not name.islower() or "_" in name.strip("_") or name.startswith("_"):
            return is_defined(name, page)
    return True


def has(owners: Sequence[str], name: str) -> bool:
    """Whether there is a module or an attribute of a class of ours; of another object, an attribute that may be its."""
    if owners[0] == "eagleray":
        return find_spec(".".join([*owners, name])) is not None
    if owners[0][0].isupper():
        return packages().has_attribute(owners[-1], name)
    return find_spec(owners[0]) is not None or {*owners[1:], name} <= packages().names


def is_defined(name: str, page: str) -> bool:
    if page.startswith(("docs/howto/", "CONTRIBUTING")) and name in of_tests().names:
        return True
    if name in packages().names | packages().words | manifests() or hasattr(builtins, name):
        return True
    return (ROOT / name).exists() or (ROOT / "deploy" / "manifests" / name).exists()


@pytest.mark.parametrize(
    ("page", "text"), [(f"{block.page}:{block.line}", block.text) for block in blocks() if block.language == "python"]
)
def test_an_example_is_python(page: str, text: str) -> None:
    compile(text, page, "exec")


def examples(page: str) -> list[str]:
    return [block.text for block in blocks() if block.page == page and block.language == "python"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def test_the_first_example_is_that_of_the_readme() -> None:
    """Which `tests/deploy/cli/test_first_use.py` runs as it is."""
    first, *_ = examples("docs/getting-started.md")
    assert first in (ROOT / "README.md").read_text()


@pytest.fixture
def local_engine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of engines on Ray that `AsyncClient` would start: one within this process, for any model."""

    def launch(config: EngineConfig, tokenizer: str | None = None, **_: Any) -> tuple[LocalEngine, FrontEnd]:
        bounds = ModelLimits(max_model_len=256, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({END_ID}))
        return LocalEngine(), FrontEnd(Tokenizer.from_dir(tiny), bounds)

    monkeypatch.setattr(async_llm, "launch", launch)


@pytest.mark.usefixtures("local_engine")
def test_the_example_of_streams_streams(capsys: pytest.CaptureFixture[str]) -> None:
    _, second = examples("docs/getting-started.md")
    exec(second, {"__name__": "__main__"})
    assert len(capsys.readouterr().out.splitlines()) > 1


@pytest.mark.usefixtures("local_engine")
def test_the_example_of_a_server_of_ones_own_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    apps: list[Any] = []
    monkeypatch.setattr("uvicorn.run", apps.append)
    (example,) = examples("docs/serving.md")
    exec(example, {})

    async def ask() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(apps[0]), base_url="http://here") as client:
            return str((await client.get("/v1/models")).json()["data"][0]["id"])

    assert asyncio.run(ask()) == "llama"


def test_the_settings_of_ray_serve_are_those_that_are_set() -> None:
    found = re.findall(r"^\| `(RAY_SERVE_\w+)=(\S+)` \|", (ROOT / "docs/deployment.md").read_text(), re.MULTILINE)
    settings = dict(found)
    assert settings.pop("RAY_SERVE_HAPROXY_BINARY_PATH").endswith("/eagleray-haproxy")
    assert settings == FASTER_STREAMS | HAPROXY


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("docs/failures.md", f"`--step-timeout-s`, {DEFAULTS.step_timeout_s:g} s by default"),
        ("docs/tuning.md", f"on CPU it is {HOST_KV_CACHE_BYTES >> 30} GiB by default"),
        ("docs/limits.md", f"`max_body_bytes`, {of_server('max_body_bytes') >> 20} MiB by default"),
        ("docs/limits.md", f"requests, {DEFAULTS.max_num_seqs + of_server('max_queued_requests')} by default"),
        ("docs/limits.md", f"{1 + DEFAULTS.max_num_seqs + of_server('max_queued_requests')} by default | each takes"),
    ],
)
def test_a_default_in_a_page_is_that_of_the_code(page: str, words: str) -> None:
    assert words in " ".join((ROOT / page).read_text().split())


def test_the_parts_of_a_requests_time_are_those_that_are_measured() -> None:
    found = re.findall(r"^\| `eagleray_(\w+)_seconds` \|", (ROOT / "docs/deployment.md").read_text(), re.MULTILINE)
    assert sorted(found) == sorted(["http", *PARTS])


@pytest.mark.parametrize(
    ("row", "bounds"),
    [
        ("lists, objects and fields", [limits.MAX_PARTS, limits.MAX_DEPTH, limits.MAX_FIELDS, limits.MAX_MESSAGES]),
        ("characters of a text", [limits.MAX_CHARACTERS, limits.CHARACTERS_A_TOKEN]),
        ("`/tokenize`, `/detokenize`", [limits.MAX_CHARACTERS, limits.MAX_TOKENIZED]),
        ("choices", [MAX_N]),
        ("arguments of tool calls", [limits.MAX_ARGUMENTS]),
        ("variables of a chat template", [limits.MAX_FIELDS]),
        ("stop texts", [field_types.MAX_STOP_STRINGS, field_types.MAX_STOP_CHARACTERS]),
        ("bad words", [MAX_BAD_WORDS]),
        ("logit biases", [limits.MAX_LISTED]),
        ("log-probabilities", [limits.MAX_ANSWER_LOGPROBS, limits.MAX_ECHOED_LOGPROBS]),
        ("prompts that `echo`", [limits.MAX_ECHOED]),
        ("bytes of an `X-Request-Id`", [field_types.MAX_REQUEST_ID]),
    ],
)
def test_the_bounds_of_a_request_are_those_of_the_code(row: str, bounds: list[int]) -> None:
    (line,) = re.findall(rf"^\| {re.escape(row)}.*$", (ROOT / "docs/limits.md").read_text(), re.MULTILINE)
    for bound in bounds:
        assert re.search(rf"(?<![\d,]){bound:,}(?![\d,]*\d)", line), f"{bound:,} is not in {line}"
