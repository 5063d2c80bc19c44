"""Every client against a running server, as a table. By hand, since they are many packages that do not go together:

    python tests/clients/run.py http://127.0.0.1:8000/v1 SmolLM2-135M-Instruct --python VENV/bin/python … --node FOLDER

Each client is tried with the first interpreter that has it; FOLDER is where npm installed openai, ai and its providers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CLIENTS = {  # script -> the module without which it cannot run
    "with_openai": "openai",
    "with_openai_stream": "openai",
    "with_litellm": "litellm",
    "with_langchain": "langchain_openai",
    "with_llama_index": "llama_index.llms.openai_like",
    "with_instructor": "instructor",
    "with_pydantic_ai": "pydantic_ai",
    "with_dspy": "dspy",
    "with_openai_agents": "agents",
    "with_lm_eval": "lm_eval",
    "with_guidellm": "guidellm",
    "with_open_webui": "json",
}
NODE = ("openai", "@ai-sdk/openai-compatible", "@ai-sdk/openai")
TIMEOUT_S = 400


def main() -> None:
    """Exit code 1 if a client failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="with /v1")
    parser.add_argument("model")
    parser.add_argument("--python", action="append", default=[], help="an interpreter that has clients")
    parser.add_argument("--node", help="a folder with node_modules")
    parser.add_argument("--only", help="scripts whose name holds this")
    given = parser.parse_args()
    commands = {name: python_command(name, given.python or [sys.executable]) for name in CLIENTS}
    if given.node:
        commands |= {
            f"node {which}": ["node", str(HERE / "with_node.mjs"), given.node, "{}", "{}", which] for which in NODE
        }
    print("| client | version | plain | history | streaming |\n|---|---|---|---|---|")
    failed = False
    for name, command in commands.items():
        if given.only and given.only not in name:
            continue
        found = result(command, given.url, given.model)
        row = [found.get(column, "-") for column in ("version", "plain", "history", "streaming")]
        failed |= not set(row[1:]) <= {"works", "-"}
        print(f"| {name.removeprefix('with_')} | {' | '.join(row)} |", flush=True)
    sys.exit(failed)


def python_command(name: str, interpreters: list[str]) -> list[str] | None:
    """With the first interpreter that has the client."""
    look = (
        f"import importlib.util, sys; sys.exit(importlib.util.find_spec({CLIENTS[name].partition('.')[0]!r}) is None)"
    )
    for interpreter in interpreters:
        if subprocess.run([interpreter, "-c", look], check=False).returncode == 0:
            return [interpreter, str(HERE / f"{name}.py"), "{}", "{}"]
    return None


def result(command: list[str] | None, url: str, model: str) -> dict[str, str]:
    """What a script says in its last line."""
    if command is None:
        return {"version": "not installed"}
    places = iter((url, model))
    filled = [next(places) if part == "{}" else part for part in command]
    try:
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(filled, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
        sys.stderr.write(done.stderr)
        found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
        return {"plain": f"{type(error).__name__}"}
    return found


if __name__ == "__main__":
    main()
