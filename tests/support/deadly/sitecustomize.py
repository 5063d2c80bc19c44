"""With this folder on its path every Python process knows one more family of models, Ray's workers included."""

from eagleray.models.architectures import ARCHITECTURES

ARCHITECTURES["DeadlyLlamaForCausalLM"] = "deadly_llama:DeadlyLlamaForCausalLM"
