"""A checkpoint that a server can offer: a few random layers, and a tokenizer of bytes with a chat template."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.random_checkpoint import make_model

SPECIAL = ["<s>", "</s>"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def write_tiny_model(path: Path, max_model_len: int = 4096) -> Path:
    """Write it to `path`; 2 KV heads, so that 2 ranks have one each."""
    byte_names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate(SPECIAL + byte_names)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    model = make_model(
        {
            "model_type": "llama",
            "vocab_size": len(vocabulary),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": max_model_len,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": True,
        }
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
