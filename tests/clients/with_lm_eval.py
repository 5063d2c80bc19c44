"""lm-eval on tasks of two rows: texts of completions and of chats, and log-probabilities of prompts that are token ids.

It neither streams nor goes on with conversations, so that these stand in the table under other heads.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from clients.checks import KEY, Site, check

TOKENIZER = Path.home() / ".cache/eagleray/models/SmolLM2-135M-Instruct"
ROWS = [{"q": "The capital of France is", "a": " Paris"}, {"q": "Two and two are", "a": " four"}]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
{more}
metric_list: [{{metric: {metric}}}]
"""
CHOICES = 'doc_to_choice: [" Paris", " four"]'
UNTIL = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}'


def evaluate(
    site: Site, backend: str, route: str, name: str, kind: str, more: str, metric: str, *, ids: bool = False
) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        task = TASK.format(name=name, file=file, kind=kind, more=more, metric=metric)
        (Path(folder) / f"{name}.yaml").write_text(task)
        place = {"model": site.model, "base_url": f"{site.url}{route}", "num_concurrent": 1}
        place |= (
            {"tokenizer_backend": "huggingface", "tokenizer": str(TOKENIZER)} if ids else {"tokenizer_backend": None}
        )
        return lm_eval.simple_evaluate(
            model=backend,
            model_args=place | {"tokenized_requests": ids},
            tasks=[name],
            task_manager=TaskManager(include_path=folder),
            apply_chat_template="chat" in backend,
        )["results"]


def plain(site: Site) -> object:
    return evaluate(site, "local-completions", "/completions", "until", "generate_until", UNTIL, "exact_match")


def history(site: Site) -> object:
    return evaluate(site, "local-completions", "/completions", "choice", "multiple_choice", CHOICES, "acc", ids=True)


def streaming(site: Site) -> object:
    chats = "local-chat-completions"
    return evaluate(site, chats, "/chat/completions", "chat", "generate_until", UNTIL, "exact_match")


if __name__ == "__main__":
    import os

    os.environ["OPENAI_API_KEY"] = KEY
    check("lm_eval", plain, history, streaming)
