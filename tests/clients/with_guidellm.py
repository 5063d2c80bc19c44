"""guidellm, which measures: a few requests, streamed as it does."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from clients.checks import Site, check

ROWS = [{"prompt": "What is the capital of France?"}, {"prompt": "Name three colours."}]


def streaming(site: Site) -> object:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        backend = f"kind=openai_http,target={site.url.removesuffix('/v1')},model={site.model}"
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--backend", backend]
        command += ["--data", f"kind=json_file,path={rows}", "--profile", "kind=synchronous", "--disable-console"]
        command += ["--constraint", f"kind=max_requests,count={len(ROWS)}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
        sys.stderr.write(done.stderr[-3000:])
        return done.returncode == 0 and f"successful={len(ROWS)} errored=0" in done.stdout + done.stderr


if __name__ == "__main__":
    check("guidellm", None, None, streaming)
