"""How much of an engine's step softrl's hooks take (`softrl bench rollout --profile`).

    step      vLLM's model runner from the scheduler's output to the sampled ids, of which
    overlay     the soft rows over the embeddings of the ids that stand in for them
    advance     from the logits to the next input, and the record, of which
      mix         the supports and mixtures of soft rows, their noise included, and
      noise         the noise alone (nothing on a GPU, where one kernel makes both)

On a GPU each of these waits for the device before and after, so a profiled step is slower than the same step unwatched, by what
the host and the device would have done side by side; the shares are those of the work itself.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from kernels import soft_embedding

STEP, OVERLAY, ADVANCE, MIX, NOISE = "step", "overlay", "advance", "mix", "noise"


class StepProfile:
    """Times a live runner's methods from its making until `stop`."""

    def __init__(self, runner: Any) -> None:
        self.steps = 0
        self.seconds = dict.fromkeys((STEP, OVERLAY, ADVANCE, MIX, NOISE), 0.0)
        self._watched = [
            (runner, "execute_model", STEP),
            (runner, "sample_tokens", STEP),
            (runner.softrl, "overlay", OVERLAY),
            (runner.softrl, "advance", ADVANCE),
            (runner.softrl.decoder.ops, "mix", MIX),
            (soft_embedding, "normal_rows", NOISE),
        ]
        self._own = [vars(target).get(method) for target, method, _ in self._watched]
        for target, method, part in self._watched:
            setattr(target, method, self._timed(getattr(target, method), part))

    def stop(self) -> dict[str, float]:
        """Leave the runner as it was: the number of its `steps` that decoded, and seconds in all by part."""
        for (target, method, _), own in zip(self._watched, self._own, strict=True):
            if own is None:
                delattr(target, method)  # uncovers the class's
            else:
                setattr(target, method, own)
        return {"steps": self.steps, **self.seconds}

    def _timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = _now()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[part] += _now() - begun
                self.steps += part == ADVANCE

        return timed


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
