"""guidellm, which measures: a few requests, streamed as it does."""

import subprocess
import sys
import tempfile
from pathlib import Path

from clients.checks import Site, check

TOKENIZER = Path.home() / ".cache/eagleray/models/SmolLM2-135M-Instruct"


def streaming(site: Site) -> object:
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("guidellm")), "benchmark", "run"]
        command += ["--target", site.url.removesuffix("/v1"), "--model", site.model, "--processor", str(TOKENIZER)]
        command += ["--data", "prompt_tokens=32,output_tokens=8", "--profile", "synchronous", "--max-requests", "3"]
        done = subprocess.run([*command, "--output-dir", folder], capture_output=True, text=True, timeout=300)
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        return done.returncode == 0 and any(Path(folder).iterdir())


if __name__ == "__main__":
    check("guidellm", streaming, None, streaming)
