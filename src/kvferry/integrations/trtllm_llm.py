"""TensorRT-LLM's `LLM` on the embedded engine."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from kvferry.config import EngineOptions, accept_options
from kvferry.engine import llm
from kvferry.engine.outputs import RequestOutput
from kvferry.engine.sampling import SamplingParams


class LLM(llm.LLM):
    """kvferry's, which takes TensorRT-LLM's other options too: `config.IgnoredEngineOptions` change nothing.

    ConfigError: any other option, or a wrong value.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(model, **accept_options(EngineOptions, options, "of LLM"))

    def generate(  # type: ignore[override]
        self,
        inputs: Any,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        cache_salt: str | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """As kvferry's; the salt is every prompt's. `use_tqdm` changes nothing: there is no progress bar."""
        params: Any = sampling_params
        if cache_salt is not None:
            salted = [replace(one or SamplingParams(), cache_salt=cache_salt) for one in _listed(params)]
            params = salted if isinstance(params, list) else salted[0]
        outputs: RequestOutput | list[RequestOutput] = super().generate(inputs, params)
        return outputs


def _listed(params: Any) -> list[Any]:
    return params if isinstance(params, list) else [params]
