"""Models of the Hugging Face hub: what is fetched, found again, pinned and refused, against a server of its API."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from eagleray.models.loading.hub import FetchError
from eagleray.models.loading.model_dir import model_dir
from support.hub_server import HubServer, Repository, files_of, hub_server
from support.tiny_model import write_tiny_model

NAME = "some-body/Tiny-1.5_B"
PROGRAM = """
import sys
from eagleray.models.loading.model_dir import model_dir
try:
    print(model_dir(sys.argv[1], weights=True))
except KeyboardInterrupt:
    sys.exit(130)
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[HubServer]:
    """With one model, and beside it what is not for us."""
    with hub_server() as server:
        others = {"onnx/config.json": b"{}", "pytorch_model.bin": b"pickle", "README.md": b"# words", "x.gguf": b"G"}
        server.repositories[NAME] = Repository()
        server.repositories[NAME].push(files_of(checkpoint) | others)
        yield server


class Node:
    """A machine with a cache of its own. The library reads variables once, so they are set where it keeps them."""

    def __init__(self, hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hub, self.home = hub, home
        self._monkeypatch = monkeypatch
        monkeypatch.chdir(home.parent)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        self.online()

    def online(self) -> None:
        self._ask(self.hub.url)
        self._monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def offline(self) -> None:
        self._monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def cut_off(self) -> None:
        self._ask("http://127.0.0.1:9")

    def _ask(self, url: str) -> None:
        self._monkeypatch.setattr(constants, "ENDPOINT", url)
        self._monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )

    def find(self, model: str = NAME, revision: str | None = None, weights: bool = True) -> Path:
        return model_dir(model, revision, weights)

    def start(self) -> "subprocess.Popen[str]":
        """The same in a process of its own, which reads the variables."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        variables = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, NAME], env=kept | variables, text=True, stdout=subprocess.PIPE
        )


@pytest.fixture
def node(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(hub, tmp_path / "hf", monkeypatch)


def test_what_is_fetched_is_what_was_pushed_and_only_what_is_needed(
    hub: HubServer, node: Node, checkpoint: Path
) -> None:
    folder = node.find()
    assert folder.name == hub.repositories[NAME].refs["main"]
    assert folder.is_relative_to(node.home)
    assert files_of(folder) == files_of(checkpoint)


def test_weights_come_only_where_they_are_wanted(hub: HubServer, node: Node, checkpoint: Path) -> None:
    small = node.find(weights=False)
    assert files_of(small) == {k: v for k, v in files_of(checkpoint).items() if k != "model.safetensors"}
    assert not hub.asked_for("safetensors")
    assert node.find() == small
    assert hub.asked_for("safetensors") == 1


def test_an_index_names_the_files_of_weights(hub: HubServer, node: Node, checkpoint: Path) -> None:
    files = files_of(checkpoint)
    whole = files.pop("model.safetensors")
    files["model.safetensors.index.json"] = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    parts = {"model-1.safetensors": whole, "model-2.safetensors": b"more", "consolidated.safetensors": b"twice"}
    hub.repositories[NAME].push(files | parts)
    del parts["consolidated.safetensors"]
    assert files_of(node.find()) == files | parts


def test_a_pinned_commit_that_is_there_asks_nobody_and_stays_what_it_is(hub: HubServer, node: Node) -> None:
    first = node.find()
    hub.repositories[NAME].push({**hub.repositories[NAME].commits[first.name], "generation_config.json": b"{}"})
    hub.asked.clear()
    assert node.find(revision=first.name) == first
    assert not hub.asked
    second = node.find()
    assert second.name == hub.repositories[NAME].refs["main"] != first.name
    assert hub.asked_for("safetensors") == 0  # the same bytes


def test_a_branch_is_a_revision(hub: HubServer, node: Node, checkpoint: Path) -> None:
    commit = hub.repositories[NAME].push(files_of(checkpoint) | {"config.json": b'{"other": 1}'}, branch="next")
    folder = node.find(revision="next")
    assert (folder.name, (folder / "config.json").read_text()) == (commit, '{"other": 1}')


def test_offline_what_is_there_is_found(hub: HubServer, node: Node) -> None:
    folder = node.find()
    hub.asked.clear()
    node.offline()
    assert node.find() == folder
    assert not hub.asked
    node.online()
    hub.status = 503
    assert node.find() == folder
    node.cut_off()
    assert node.find() == folder


@pytest.mark.parametrize("small_only", [False, True])
def test_offline_it_says_what_was_looked_for_and_where(hub: HubServer, node: Node, small_only: bool) -> None:
    if small_only:
        node.find(weights=False)
    node.offline()
    with pytest.raises(FetchError, match=f"^model {NAME} at {hub.url} is not whole in {node.home}/hub, and HF_HUB_OFF"):
        node.find()
    node.online()
    node.cut_off()
    with pytest.raises(FetchError, match=rf"not whole in {node.home}/hub, and the hub cannot be reached \(.*refused\)"):
        node.find()


def test_a_hub_that_fails_is_told_from_a_model_that_is_not_there(hub: HubServer, node: Node) -> None:
    hub.status = 500
    with pytest.raises(FetchError, match=rf"model {NAME} at {hub.url} .*500"):
        node.find()


def test_a_name_that_the_hub_does_not_have_is_said_to_be_no_directory_either(hub: HubServer, node: Node) -> None:
    name = "some-body/Tinny"
    with pytest.raises(ValueError, match=f"^there is no directory {name}, and no model {name} at {hub.url}.*HF_TOKEN"):
        node.find(name)


@pytest.mark.parametrize(
    "name",
    ["./modle", "../some-body/Tiny", "/models/tiny", "modle", "some-body/Tiny/", "a/b/c", "~/x", "a//b", "a/b "],
)
def test_a_path_is_never_asked_of_the_hub(hub: HubServer, node: Node, name: str) -> None:
    with pytest.raises(ValueError, match=r"^there is no model directory "):
        node.find(name)
    assert not hub.asked


def test_a_directory_comes_before_a_model_of_the_hub(hub: HubServer, node: Node, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, NAME)
    assert node.find() == Path(NAME)
    with pytest.raises(ValueError, match=f"^revision is 'main', but {NAME} is not a model of the Hugging Face hub"):
        node.find(revision="main")
    assert not hub.asked


def test_a_revision_that_does_not_exist_is_named(node: Node) -> None:
    with pytest.raises(ValueError, match=f"model {NAME}, revision v9, at .* does not exist, though the model does"):
        node.find(revision="v9")


def test_a_gated_model_needs_a_token(
    hub: HubServer, node: Node, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME].token = "hf_right"
    refusal = f"^model {NAME} at {hub.url} is gated: request access.*HF_TOKEN"
    with pytest.raises(ValueError, match=refusal):
        node.find()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=refusal):
        node.find()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert files_of(node.find()) == files_of(checkpoint)


def test_a_model_without_safetensors_is_refused(hub: HubServer, node: Node, checkpoint: Path) -> None:
    files = files_of(checkpoint)
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.repositories[NAME].push(files)
    with pytest.raises(ValueError, match=r"has no model\.safetensors, and safetensors are what Eagleray reads"):
        node.find()


def test_what_is_no_model_is_refused(hub: HubServer, node: Node) -> None:
    hub.repositories["some-body/words"] = Repository()
    hub.repositories["some-body/words"].push({"data.json": b"{}"})
    with pytest.raises(ValueError, match=r"has no config\.json, so it is not a model"):
        node.find("some-body/words")


def test_a_download_that_is_cut_short_goes_on(hub: HubServer, node: Node, checkpoint: Path) -> None:
    hub.cuts["model.safetensors"] = 1
    assert files_of(node.find()) == files_of(checkpoint)


def test_two_processes_at_once_fetch_it_once(hub: HubServer, node: Node, checkpoint: Path) -> None:
    processes = [node.start() for _ in range(2)]
    folders = {process.communicate(timeout=120)[0] for process in processes}
    (folder,) = folders
    assert files_of(Path(folder.strip())) == files_of(checkpoint)
    assert hub.asked_for("safetensors") == 1


def test_after_ctrl_c_within_a_download_nothing_half_is_taken_for_the_file(
    hub: HubServer, node: Node, checkpoint: Path
) -> None:
    """`huggingface_hub` itself would go on until it has what it began."""
    hub.stalls_at = "model.safetensors"
    process = node.start()
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert not list(node.home.rglob("*.incomplete"))
    hub.stalls_at = None
    assert files_of(node.find()) == files_of(checkpoint)


def test_a_disk_that_is_full_is_named_and_nothing_half_stays(node: Node, checkpoint: Path) -> None:
    node.find(weights=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((checkpoint / "model.safetensors").stat().st_size // 2, hard))
    try:
        with pytest.raises(
            FetchError, match=f"into {node.home}/hub: .*File too large.*; make room there, or set HF_HOME"
        ):
            node.find()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(node.home.rglob("*.incomplete"))
    assert files_of(node.find()) == files_of(checkpoint)


def test_a_disk_that_cannot_take_it_is_named(node: Node) -> None:
    node.home.write_text("a file in the way")
    with pytest.raises(
        FetchError, match=f"cannot be fetched into {node.home}/hub: .*; make room there, or set HF_HOME"
    ):
        node.find()
