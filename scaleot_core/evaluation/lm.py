"""A model in memory as lm-evaluation-harness sees it; imported where it is used, since lm-eval takes seconds."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from scaleot_core.common.progress import Tick, progress
from scaleot_core.evaluation.scoring import score


class InMemoryLM(HFLM):
    """lm-eval asks and counts; `scoring` answers, and progress is shown our way, under `label`."""

    tick: Tick

    def __init__(self, *, label: str, **options: Any) -> None:
        super().__init__(**options)
        self.label = label

    def _watched(self, ask: Callable[..., list[Any]], requests: list[Any], steps: int) -> list[Any]:
        with progress(self.label, steps) as self.tick:
            return ask(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._watched(super().loglikelihood, requests, len(requests))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = sum(math.ceil(len(self.tok_encode(r.args[0])) / self.max_length) for r in requests)
        batch_size = int(self.batch_size)
        self.batch_size_per_gpu = 1  # lm-eval pads texts to the longest in a batch
        try:
            return self._watched(super().loglikelihood_rolling, requests, windows)
        finally:
            self.batch_size_per_gpu = batch_size

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._watched(super().generate_until, requests, math.ceil(len(requests) / self.batch_size_per_gpu))

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        size, length = self.batch_size_per_gpu, self.max_length
        return score(self.model, pairs, batch_size=size, max_length=length, tick=self.tick)

    def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        tokens = super()._model_generate(context, *args, **options)
        self.tick(tokens=tokens.numel())
        return tokens
