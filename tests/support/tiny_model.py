"""A checkpoint of a few thousand random weights whose tokens are the bytes of a text."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from support.random_checkpoint import make_model

START, END = "<|start|>", "<|end|>"
SPECIAL = (START, END)
END_ID = 257
VOCAB_SIZE = 258
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'narrator' %}* {% endif %}"
    "<|start|>{{ message.role }}{{ ' ' + message.name if message.name }}\n{{ message.content }}"
    "{% if not (continue_final_message and loop.last) %}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{{ mood }}{% endif %}"
)


def write_tiny_model(path: Path, max_model_len: int = 4096) -> Path:
    """A Llama of one layer, written to `path`: ids 0 to 255 are bytes, 256 starts a message and 257 ends it."""
    options = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_model_len,
        "eos_token_id": END_ID,
        "bos_token_id": 256,
    }
    make_model(options).save_pretrained(path)
    return write_tokenizer(path)


def write_tokenizer(path: Path, chat_template: str = CHAT_TEMPLATE) -> Path:
    """The model's tokenizer alone."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": START, "eos_token": END, "chat_template": chat_template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
