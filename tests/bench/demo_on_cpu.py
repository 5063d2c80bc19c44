"""Tokens per second of the demo model on CPU: Eagleray with 1 and 16 requests at once, and transformers one by one.

Both sides run in this order, alone on the machine, in float32 with all cores, greedy, with the same prompts and numbers
of new tokens; the first run of each is not counted. Prints one JSON object per case.

Usage: python tests/bench/demo_on_cpu.py [TENSOR_PARALLEL_SIZE …]
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from eagleray import LLM, SamplingParams
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.models.loading.demo_model import demo_model

NUM_NEW_TOKENS = 64
NUM_PROMPTS = 16
PROMPT = "Write two sentences about the number {}."


def prompts(directory: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_dir(directory)
    chats = ([{"role": "user", "content": PROMPT.format(number)}] for number in range(NUM_PROMPTS))
    return [tokenizer.encode(tokenizer.apply_chat_template(chat)) for chat in chats]


def run_transformers(directory: Path, token_ids: list[list[int]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def generate(prompt: list[int]) -> None:
        ids = torch.tensor([prompt])
        length = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
        assert out.shape[1] == len(prompt) + NUM_NEW_TOKENS

    generate(token_ids[0])
    for count in (1, NUM_PROMPTS):
        begin = time.perf_counter()
        for prompt in token_ids[:count]:
            generate(prompt)
        report("transformers", 1, count, begin)


def run_eagleray(directory: Path, token_ids: list[list[int]], size: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    options: dict[str, Any] = {"max_model_len": 1024, "enable_prefix_caching": False}
    with LLM(directory, size, **options) as llm:
        llm.generate(token_ids[:1], params, use_tqdm=False)
        for count in (1, NUM_PROMPTS):
            begin = time.perf_counter()
            llm.generate(token_ids[:count], params, use_tqdm=False)
            report("eagleray", size, count, begin)


def report(engine: str, size: int, count: int, begin: float) -> None:
    seconds = time.perf_counter() - begin
    rate = round(count * NUM_NEW_TOKENS / seconds, 1)
    print(json.dumps({"engine": engine, "tp": size, "requests": count, "tokens_per_s": rate}), flush=True)


def main() -> None:
    directory = demo_model()
    token_ids = prompts(directory)
    for size in [int(argument) for argument in sys.argv[1:]] or [1, 2]:
        run_eagleray(directory, token_ids, size)
    run_transformers(directory, token_ids)


if __name__ == "__main__":
    main()
