"""With this folder on its path every Python process knows one more family of models, Ray's workers included."""

from eagleray.models.registry import ARCHITECTURES

ARCHITECTURES["DeadlyLlamaForCausalLM"] = "deadly_llama:DeadlyLlamaForCausalLM"
