"""How long `eagleray serve` takes from the command to the first token of the first answer, and to what that goes.

Starts it as a user would, with a Ray of its own, and asks for one token as soon as it says where it answers. Prints one
JSON object: seconds by this clock, and the line in which the command says where its own time went.

Usage: python tests/bench/serve_start.py [MODEL] [option of `eagleray serve` …]
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx

from eagleray.deploy.bench.environment import hardware, versions
from eagleray.deploy.serve.environment import free_ports


def main() -> None:
    model, *options = sys.argv[1:] or ["demo"]
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "eagleray", "serve", model, "--port", str(port), *options]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"RAY_ADDRESS": "local"}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said = re.search(r"http\S+", process.stdout.readline())
    assert said, process.stderr.read()
    url_s = time.perf_counter() - begin
    asked = {"prompt": "Once upon a time", "max_tokens": 1}
    httpx.post(f"{said[0]}/completions", json=asked, timeout=600).raise_for_status()
    answer_s = time.perf_counter() - begin
    parts = next(line.strip() for line in process.stderr if "ready in" in line)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    figures = {"url_s": round(url_s, 2), "first_token_s": round(answer_s, 2), "said": parts}
    load = round(os.getloadavg()[0], 1)
    print(json.dumps(figures | {"options": options, "load": load, "versions": versions(), "hardware": hardware()}))


if __name__ == "__main__":
    main()
