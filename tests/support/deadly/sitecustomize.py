"""With this folder on its path every Python process knows one more family of models, Ray's workers included."""

from eagleray.models.architectures import ARCHITECTURES, Architecture

ARCHITECTURES["DeadlyLlamaForCausalLM"] = Architecture(model="deadly_llama:DeadlyLlamaForCausalLM")
