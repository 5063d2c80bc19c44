"""The rooms' rules, read from the syntax trees: which way imports point, who imports what, which words stay out.

Each rule is a function from a file's path and text to the lines that break it. One test runs it over the tree and
another gives it a text that breaks it.

Imports are statements, names of modules that `import_module` and `__import__` are given as they stand, and texts that
are nothing but a name within `eagleray`. What is not seen: names that a program puts together, what `exec` and another
process run, objects that are handed over at run time, and what a file does with an object that it may import.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

from support.small_engine import CONFIG

ROOT = Path(__file__).parents[1]
ROOMS = ("parallel", "models", "workers", "cluster", "deploy")  # each may import itself and those before it
RAY = ("deploy/", "cluster/runtime/", "workers/actor.py")  # where actors are placed, called and watched
FILES = {  # those that stand in a room itself, in groups
    "cluster: settings": ("config", "errors", "options", "outputs", "sampling_params"),
    "cluster: entrances": ("async_llm", "llm"),
    "models: facts": ("architectures", "config", "json_file"),
    "models: parts": ("attention", "decoder", "kernels", "layers", "weights"),
    "models: families": ("gemma2", "llama", "qwen"),
    "parallel: devices": ("cuda_graphs", "device_kind", "platform"),
    "parallel: kernels": ("low_latency_reduce", "single_row", "skinny"),
    "parallel: ranks": ("group", "network", "symmetric_memory", "tcp_gather"),
    "parallel: layers": ("embedding", "linear", "sharding", "weight", "weight_shard"),
    "workers: tools": ("arrays", "out_of_memory", "pinned_copy"),
    "workers: reports": ("heartbeat", "output_sender", "profiler", "startup_reporter"),
    "workers: batches": ("model_runner", "row_kernels", "rows"),
    "workers: steps": ("pending_output", "worker"),
    "workers: ranks": ("actor", "fit", "kv_capacity", "oom_guard", "rank", "rank_phases", "rank_start"),
}
WITHIN = {  # what else of its room a folder or a group of files may import
    "cluster: settings": (),
    "cluster/core": ("cluster: settings",),
    "cluster/frontend": ("cluster: settings", "cluster/core"),
    "cluster/runtime": ("cluster: settings", "cluster/core", "cluster/frontend"),
    "cluster: entrances": ("cluster: settings", "cluster/frontend", "cluster/runtime"),
    "deploy/batch": ("deploy/cli", "deploy/openai"),
    "deploy/bench": ("deploy/cli",),
    "deploy/cli": (),
    "deploy/openai": (),
    "deploy/openai/middleware": ("deploy/openai",),
    "deploy/profile": ("deploy/bench", "deploy/cli"),
    "deploy/serve": ("deploy/cli", "deploy/openai", "deploy/openai/middleware"),
    "models: facts": (),
    "models: parts": ("models: facts",),
    "models: families": ("models: facts", "models: parts"),
    "models/loading": ("models: facts", "models: parts"),
    "parallel: devices": (),
    "parallel: kernels": ("parallel: devices",),
    "parallel: ranks": ("parallel: devices", "parallel: kernels"),
    "parallel: layers": ("parallel: devices", "parallel: kernels", "parallel: ranks"),
    "workers: tools": (),
    "workers/attention": (),
    "workers/protocol": (),
    "workers: reports": ("workers: tools", "workers/protocol"),
    "workers: batches": ("workers: tools", "workers/attention", "workers/protocol"),
    "workers/sampling": ("workers: tools", "workers: batches", "workers/protocol", "workers/sampling/redraw"),
    "workers/sampling/redraw": ("workers: tools", "workers/protocol", "workers/sampling"),
    "workers/graphs": (
        "workers: tools",
        "workers: batches",
        "workers/attention",
        "workers/protocol",
        "workers/sampling",
    ),
    "workers: steps": ("workers: tools", "workers: batches", "workers/graphs", "workers/protocol", "workers/sampling"),
    "workers: ranks": (
        *("workers: tools", "workers: reports", "workers: steps"),
        *("workers/attention", "workers/graphs", "workers/protocol"),
    ),
}
CIRCLES = {  # pairs that import each other
    (
        "workers/sampling",
        "workers/sampling/redraw",
    ): "the kernels of `redraw` use the same columns and bits as the rest, "
    "and `kernel_sampler.py`, which launches them, belongs to the sampler",
}
_LATE = "names functions in texts, so that no command waits for another's imports"
EXCEPTIONS = {  # a file, and what it imports though its folder or group may not
    ("deploy/cli/main.py", "deploy/batch"): _LATE,
    ("deploy/cli/main.py", "deploy/bench"): _LATE,
    ("deploy/cli/main.py", "deploy/profile"): _LATE,
    ("deploy/cli/main.py", "deploy/serve"): _LATE,
    ("models/architectures.py", "models: families"): "names their classes in texts, since they import torch",
    ("models/architectures.py", "models: parts"): "a type alone",
}
FROM_WORKERS = {  # what other rooms may import of workers/
    "cluster": ("eagleray.workers.protocol",),
    "cluster/runtime": ("eagleray.workers.protocol", "eagleray.workers.actor.RankActor"),
    "deploy": ("eagleray.workers.protocol",),
}
FOREIGN_WORDS = frozenset({"cache", "caches", "cached", "caching", "metadata", "ray"})  # in parallel/ and models/
CHOSEN_ELSEWHERE = {"cache_modifier", "empty_cache"}  # an argument of Triton's, a function of torch's
KNOW_DEVICES = ("parallel/cuda_graphs.py", "parallel/device_kind.py", "parallel/platform.py")
ACCELERATORS = frozenset({"cuda", "hip", "mps", "rocm", "xpu"})
IS_ON = frozenset({f"is_{name}" for name in (*ACCELERATORS, "cpu")})  # attributes of tensors
OWN_NAME = re.compile(r"eagleray(\.\w+)+(:\w+)?")  # a text that is nothing but a name of ours
SOURCES = sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py"))

Rule = Callable[[str, str], list[str]]


def room_of(path: str) -> str:
    return PurePosixPath(path).parts[0]


def imports(text: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import, at the top or inside a function; relative ones begin with a dot."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from ((node.lineno, f"{'.' * level}{module or ''}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ) if not OWN_NAME.fullmatch(name):
                yield node.lineno, name
            case ast.Constant(value=str(name)) if OWN_NAME.fullmatch(name):
                yield node.lineno, name.replace(":", ".")


def is_or_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def points_one_way(path: str, text: str) -> list[str]:
    """deploy -> cluster -> workers -> models -> parallel; no room takes the public names from the package itself."""
    room = room_of(path)
    later = ROOMS[ROOMS.index(room) + 1 :]
    wrong = []
    for line, name in imports(text):
        if not is_or_inside(name, "eagleray"):
            continue
        target = name.partition(".")[2].split(".")[0]
        if target not in ROOMS or target in later:
            wrong.append(f"{path}:{line}: {room}/ imports {name}")
    return wrong


def imports_absolutely(path: str, text: str) -> list[str]:
    """`eagleray.models.config`, neither `.config` nor `models.config`."""
    return [
        f"{path}:{line}: {name} is not an absolute import from eagleray"
        for line, name in imports(text)
        if name.startswith(".") or any(is_or_inside(name, room) for room in ROOMS)
    ]


def cluster_without_torch(path: str, text: str) -> list[str]:
    if room_of(path) != "cluster":
        return []
    return [f"{path}:{line}: cluster/ imports {name}" for line, name in imports(text) if is_or_inside(name, "torch")]


def ray_where_actors_are_placed(path: str, text: str) -> list[str]:
    if path.startswith(RAY):
        return []
    return [f"{path}:{line}: Ray is imported" for line, name in imports(text) if is_or_inside(name, "ray")]


def unit_of(place: str) -> str:
    """The folder of a module `cluster.core.x`, or its group; "" for a room as a whole, and for what is nowhere."""
    room, *rest = place.split(".")
    folders = [unit for unit in WITHIN if "/" in unit and is_or_inside(place, unit.replace("/", "."))]
    groups = [unit for unit, files in FILES.items() if unit.startswith(f"{room}:") and rest[:1] and rest[0] in files]
    return max(folders, key=len, default=next(iter(groups), ""))


def folders_and_files_point_one_way(path: str, text: str) -> list[str]:
    """A folder, and a group of files that stand in a room itself, imports itself and what it may."""
    if PurePosixPath(path).name == "__init__.py":
        return []  # which imports nothing
    unit = unit_of(path.removesuffix(".py").replace("/", "."))
    wrong = []
    for line, name in imports(text):
        place = name.removeprefix("eagleray.")
        if name == place or place.split(".")[0] != room_of(path):
            continue
        of = unit_of(place)
        if of not in (unit, *WITHIN.get(unit, ())) and (path, of) not in EXCEPTIONS:
            wrong.append(f"{path}:{line}: {unit or path} imports {name}")
    return wrong


def only_the_protocol_of_the_ranks(path: str, text: str) -> list[str]:
    """Of workers/, others know the messages, and cluster/runtime the actor that it starts; never how a step runs."""
    allowed = FROM_WORKERS.get(PurePosixPath(path).parent.as_posix(), FROM_WORKERS.get(room_of(path)))
    if allowed is None:
        return []
    return [
        f"{path}:{line}: {name} is imported"
        for line, name in imports(text)
        if is_or_inside(name, "eagleray.workers") and not any(is_or_inside(name, other) for other in allowed)
    ]


def words(token: str) -> set[str]:
    """`KVCache_size` -> {kv, cache, size}."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", token)}


def speaks_of_tokens_only(path: str, text: str) -> list[str]:
    """parallel/ and models/ name no cache, metadata or Ray: in no identifier, text or comment.

    models/loading/ may: files are cached, and have metadata. It computes nothing.
    """
    if room_of(path) not in ("parallel", "models") or path.startswith("models/loading/"):
        return []
    return [
        f"{path}:{token.start[0]}: says {', '.join(sorted(found))}"
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.string not in CHOSEN_ELSEWHERE and (found := words(token.string) & FOREIGN_WORDS)
    ]


def capabilities_not_devices(path: str, text: str) -> list[str]:
    """What depends on a device asks its `Platform` or `DeviceKind` for a capability, not the device for its name."""
    if path in KNOW_DEVICES:
        return []
    wrong = [
        (line, name) for line, name in imports(text) if name.split(".")[:2] in [["torch", a] for a in ACCELERATORS]
    ]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Attribute(attr=name) if name in IS_ON:
                wrong.append((node.lineno, name))
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name in ACCELERATORS:
                wrong.append((node.lineno, f"torch.{name}"))
            case ast.Constant(value=name) if name in ACCELERATORS:
                wrong.append((node.lineno, repr(name)))
            case ast.Compare():
                wrong += [(node.lineno, ast.unparse(part)) for part in ast.walk(node) if _tells_devices_apart(part)]
    return [f"{path}:{line}: {name} asks what a device is" for line, name in wrong]


def _tells_devices_apart(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value="cpu"):
            return True
        case ast.Attribute(attr="type", value=ast.Name(id=owner) | ast.Attribute(attr=owner)):
            return owner.endswith("device")
    return False


def rooms_re_export_nothing(path: str, text: str) -> list[str]:
    """A room's `__init__.py` holds at most a docstring."""
    if PurePosixPath(path).name != "__init__.py":
        return []
    body = ast.parse(text).body
    return [
        f"{path}:{node.lineno}: only a docstring may stand here"
        for node in body
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]


RULES: list[Rule] = [
    points_one_way,
    imports_absolutely,
    cluster_without_torch,
    ray_where_actors_are_placed,
    folders_and_files_point_one_way,
    only_the_protocol_of_the_ranks,
    speaks_of_tokens_only,
    capabilities_not_devices,
    rooms_re_export_nothing,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps(rule: Rule) -> None:
    broken = [line for path in SOURCES for line in rule(path, (ROOT / path).read_text())]
    assert not broken, "\n" + "\n".join(broken)


VIOLATIONS: list[tuple[Rule, str, str]] = [
    (points_one_way, "models/x.py", "from eagleray.workers.protocol.messages import Step"),
    (points_one_way, "workers/x.py", "import eagleray.cluster.config"),
    (points_one_way, "cluster/x.py", "def f():\n    from eagleray.deploy import cli"),
    (points_one_way, "cluster/x.py", "from eagleray import LLM"),
    (points_one_way, "parallel/x.py", "import eagleray"),
    (imports_absolutely, "cluster/x.py", "from .config import EngineConfig"),
    (imports_absolutely, "cluster/x.py", "from .. import workers"),
    (imports_absolutely, "cluster/x.py", "from models.config import ModelConfig"),
    (imports_absolutely, "deploy/x.py", "import cluster.config"),
    (cluster_without_torch, "cluster/x.py", "import torch"),
    (cluster_without_torch, "cluster/x.py", "def f():\n    from torch.distributed import Store"),
    (ray_where_actors_are_placed, "cluster/core/scheduler.py", "import ray"),
    (ray_where_actors_are_placed, "workers/worker.py", "def f():\n    from ray.util import placement_group"),
    (cluster_without_torch, "cluster/core/x.py", "__import__('torch')"),
    (ray_where_actors_are_placed, "cluster/core/x.py", "import_module('ray')"),
    (ray_where_actors_are_placed, "cluster/core/x.py", "importlib.import_module('ray.util', None)"),
    (points_one_way, "cluster/core/x.py", "import_module('eagleray.deploy.cli.main')"),
    (points_one_way, "workers/x.py", "run = 'eagleray.cluster.llm:LLM'"),
    (folders_and_files_point_one_way, "cluster/core/x.py", "from eagleray.cluster.frontend.prompts import Prompt"),
    (folders_and_files_point_one_way, "cluster/runtime/x.py", "def f():\n    import eagleray.cluster.llm"),
    (folders_and_files_point_one_way, "cluster/core/x.py", "import eagleray.cluster"),
    (folders_and_files_point_one_way, "cluster/core/x.py", "from eagleray.cluster import runtime"),
    (folders_and_files_point_one_way, "cluster/errors.py", "from eagleray.cluster.runtime.launch import launch"),
    (folders_and_files_point_one_way, "deploy/openai/x.py", "from eagleray.deploy.openai.middleware import cors"),
    (folders_and_files_point_one_way, "deploy/cli/x.py", "run = 'eagleray.deploy.serve.command:run'"),
    (folders_and_files_point_one_way, "models/decoder.py", "from eagleray.models.loading.loader import load_model"),
    (folders_and_files_point_one_way, "models/decoder.py", "from eagleray.models import llama"),
    (folders_and_files_point_one_way, "parallel/platform.py", "from eagleray.parallel.group import TPGroup"),
    (folders_and_files_point_one_way, "workers/protocol/x.py", "from eagleray.workers.sampling import sampler"),
    (folders_and_files_point_one_way, "workers/rows.py", "from eagleray.workers.graphs.runner import GraphRunner"),
    (folders_and_files_point_one_way, "workers/graphs/x.py", "from eagleray.workers.worker import Worker"),
    (folders_and_files_point_one_way, "workers/of_no_group.py", "from eagleray.workers.arrays import IntArray"),
    (only_the_protocol_of_the_ranks, "cluster/core/x.py", "from eagleray.workers.rows import Rows"),
    (only_the_protocol_of_the_ranks, "cluster/frontend/x.py", "from eagleray.workers.actor import RankActor"),
    (only_the_protocol_of_the_ranks, "cluster/runtime/x.py", "from eagleray.workers.actor import Rank"),
    (only_the_protocol_of_the_ranks, "cluster/runtime/x.py", "import eagleray.workers.actor"),
    (only_the_protocol_of_the_ranks, "deploy/serve/x.py", "from eagleray.workers.rank import Rank"),
    (speaks_of_tokens_only, "models/x.py", "kv_cache = 1"),
    (speaks_of_tokens_only, "models/x.py", "class AttentionMetadata: ..."),
    (speaks_of_tokens_only, "parallel/x.py", "x = 1  # one per Ray actor"),
    (speaks_of_tokens_only, "models/x.py", '"""Writes to the KVCache."""'),
    (capabilities_not_devices, "models/x.py", "if x.is_cuda and fused: ..."),
    (capabilities_not_devices, "workers/x.py", "waits = not x.is_cpu"),
    (capabilities_not_devices, "workers/x.py", "if self.device.type in SLOW: ..."),
    (capabilities_not_devices, "cluster/x.py", "gpus = 0 if config.device == 'cpu' else 1"),
    (capabilities_not_devices, "cluster/x.py", "gpus = int(device == 'cuda')"),
    (capabilities_not_devices, "parallel/x.py", "BACKENDS = {'xpu': 'xccl'}"),
    (capabilities_not_devices, "workers/x.py", "torch.cuda.synchronize()"),
    (capabilities_not_devices, "workers/x.py", "from torch.cuda import Event"),
    (rooms_re_export_nothing, "cluster/__init__.py", '"""Words."""\nfrom eagleray.cluster.config import EngineConfig'),
    (rooms_re_export_nothing, "models/__init__.py", "__all__ = []"),
]


@pytest.mark.parametrize(("rule", "path", "text"), VIOLATIONS)
def test_a_violation_is_caught(rule: Rule, path: str, text: str) -> None:
    assert len(rule(path, text)) == 1


ALLOWED: list[tuple[Rule, str, str]] = [
    (points_one_way, "deploy/x.py", "from eagleray.parallel.group import TPGroup\nimport eagleray.cluster.config"),
    (points_one_way, "models/x.py", "from eagleray.models.config import ModelConfig"),
    (imports_absolutely, "cluster/x.py", "import transformers.models\nfrom eagleray.models.config import ModelConfig"),
    (cluster_without_torch, "workers/x.py", "import torch"),
    (ray_where_actors_are_placed, "workers/actor.py", "import ray"),
    (ray_where_actors_are_placed, "cluster/runtime/x.py", "import ray"),
    (folders_and_files_point_one_way, "cluster/frontend/x.py", "from eagleray.cluster.core.messages import Abort"),
    (folders_and_files_point_one_way, "cluster/frontend/x.py", "from eagleray.cluster.errors import counted"),
    (folders_and_files_point_one_way, "cluster/llm.py", "from eagleray.cluster.frontend.prompts import Prompt"),
    (
        folders_and_files_point_one_way,
        "deploy/openai/middleware/x.py",
        "from eagleray.deploy.openai.errors import ApiError",
    ),
    (folders_and_files_point_one_way, "deploy/cli/main.py", "run = 'eagleray.deploy.serve.command:run'"),
    (folders_and_files_point_one_way, "workers/rows.py", "from eagleray.workers import row_kernels"),
    (only_the_protocol_of_the_ranks, "cluster/core/x.py", "from eagleray.workers.protocol.messages import Step"),
    (only_the_protocol_of_the_ranks, "cluster/runtime/x.py", "from eagleray.workers.actor import RankActor"),
    (only_the_protocol_of_the_ranks, "workers/x.py", "from eagleray.workers.rows import Rows"),
    (ray_where_actors_are_placed, "deploy/x.py", "from ray import serve"),
    (speaks_of_tokens_only, "models/loading/x.py", 'del header["__metadata__"]  # of a cached file'),
    (speaks_of_tokens_only, "models/x.py", "array = 'an array, a stray word'  # Raymond"),
    (capabilities_not_devices, "parallel/platform.py", "x = torch.cuda.is_available() and x.device.type == 'cuda'"),
    (capabilities_not_devices, "models/x.py", "root = torch.tensor(2.0, device='cpu'); linear = rope.type == 'linear'"),
    (capabilities_not_devices, "workers/x.py", "from triton.language.extra.cuda import gdc_wait"),
    (rooms_re_export_nothing, "cluster/__init__.py", '"""What runs next."""'),
]


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_what_is_allowed_passes(rule: Rule, path: str, text: str) -> None:
    assert rule(path, text) == []


def test_no_folders_import_each_other_in_a_circle() -> None:
    """But for those that are listed, each with its reason."""
    graph = {unit: set(others) for unit, others in WITHIN.items()}
    for one, other in CIRCLES:
        assert other in graph[one], f"{one} does not import {other}"
        graph[other].remove(one)
    TopologicalSorter(graph).prepare()


def test_no_exception_is_left_that_nothing_needs() -> None:
    needed = {
        (path, unit_of(name.removeprefix("eagleray.")))
        for path in {path for path, _ in EXCEPTIONS}
        for _, name in imports((ROOT / path).read_text())
    }
    assert set(EXCEPTIONS) <= needed


def modules_left_behind(statements: str) -> set[str]:
    """Names in `sys.modules` of a new Python that ran `statements`."""
    script = f"{statements}\nimport sys\nprint('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True, check=True, timeout=120
    )
    return set(run.stdout.split())


def test_importing_all_of_cluster_leaves_out_what_is_slow() -> None:
    modules = [path.removesuffix(".py").replace("/", ".") for path in SOURCES if room_of(path) == "cluster"]
    loaded = modules_left_behind("\n".join(f"import eagleray.{module}" for module in modules))
    assert "eagleray.cluster.config" in loaded
    assert not loaded & {"torch", "transformers"}


START = """
from eagleray.workers.protocol.channel import Hub
from eagleray.workers.rank import Rank
from eagleray.workers.rank_start import Place
from support.worker_config import worker_config
numbers = dict(max_model_len=64, block_size=4, max_num_seqs=2, max_num_batched_tokens=32, kv_cache_bytes=10**6)
hub = Hub()
rank = Rank(Place(0, 1, 0, "here", "127.0.0.1"), worker_config(model={model!r}, **numbers), hub.endpoint, hub.endpoint)
host = rank.prepare(one_node=True)
num_blocks = rank.load(host.store_ip, host.store_port).num_blocks
rank._phase._worker(num_blocks)
"""


@pytest.mark.slow
def test_a_rank_is_ready_without_torchs_compiler(tmp_path: Path) -> None:
    """Which takes longer to import than all that a rank needs."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    loaded = modules_left_behind(START.format(model=str(tmp_path)))
    assert "torch" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "transformers"}


def test_every_room_is_read() -> None:
    assert {room_of(path) for path in SOURCES} == set(ROOMS)
    folders = {PurePosixPath(path).parent.as_posix() for path in SOURCES}
    assert folders == {*ROOMS, *(unit for unit in WITHIN if "/" in unit)}
    assert set(WITHIN) == set(FILES) | (folders - set(ROOMS))
    in_rooms = sorted(f"{unit.split(':')[0]}/{name}.py" for unit, names in FILES.items() for name in names)
    assert in_rooms == [path for path in SOURCES if path.count("/") == 1 and not path.endswith("__init__.py")]
    assert {entry.name for entry in (ROOT / "src" / "eagleray").iterdir() if entry.is_symlink()} == set(ROOMS)
