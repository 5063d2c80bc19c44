"""Eagleray, a tensor-parallel LLM inference engine on Ray.

The public names are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eagleray.cluster.async_llm import AsyncLLM
    from eagleray.cluster.config import EngineConfig
    from eagleray.cluster.errors import EngineClosedError, EngineDeadError, EngineStartError
    from eagleray.cluster.llm import LLM
    from eagleray.cluster.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, RequestOutputKind
    from eagleray.cluster.sampling_params import SamplingParams

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "CompletionOutput": "outputs",
    "EngineConfig": "config",
    "EngineClosedError": "errors",
    "EngineDeadError": "errors",
    "EngineStartError": "errors",
    "Logprob": "outputs",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "RequestOutputKind": "outputs",
    "SamplingParams": "sampling_params",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineClosedError",
    "EngineConfig",
    "EngineDeadError",
    "EngineStartError",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"eagleray.cluster.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
