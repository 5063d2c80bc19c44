"""A Llama that ends its process when it meets one token, as a request can that hits a bug in a kernel."""

import os

from torch import Tensor

from eagleray.models.llama import LlamaForCausalLM

DEADLY_TOKEN = 4242


class DeadlyLlamaForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        if bool((input_ids == DEADLY_TOKEN).any()):
            os._exit(1)
        return super().forward(input_ids, positions)
