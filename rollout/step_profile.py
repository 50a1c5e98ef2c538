"""How much of an engine's step softrl's hooks take (`softrl bench rollout --profile`).

    step      vLLM's model runner from the scheduler's output to the sampled ids, of which
    overlay     the soft rows over the embeddings of the ids that stand in for them
    advance     from the logits to the next input, and the record, of which
      mix         the supports and mixtures of soft rows, their noise included, and
      noise         the noise alone (nothing on a GPU, where one kernel makes both)

On a GPU each of these waits for the device before and after, so a profiled step is slower than the same step unwatched, by what
the host and the device would have done side by side; the shares are those of the work itself.

Forced and answered tokens mix nothing and prefills take long: what a mixture costs is said of the steps that mix the most rows.
"""

import functools
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from kernels import soft_embedding

STEP, OVERLAY, ADVANCE, MIX, NOISE = PARTS = "step", "overlay", "advance", "mix", "noise"


class StepProfile:
    """Times a live runner's methods from its making until `stop`."""

    def __init__(self, runner: Any) -> None:
        self._steps: list[dict[str, float]] = []  # seconds by part, and the rows that mixed
        ops = runner.softrl.decoder.ops
        self._watched = [
            (runner, "execute_model", self._timed(runner.execute_model, STEP, begins=True)),
            (runner, "sample_tokens", self._timed(runner.sample_tokens, STEP)),
            (runner.softrl, "overlay", self._timed(runner.softrl.overlay, OVERLAY)),
            (runner.softrl, "advance", self._timed(runner.softrl.advance, ADVANCE)),
            (ops, "mix", self._counted(self._timed(ops.mix, MIX))),
            (soft_embedding, "normal_rows", self._timed(soft_embedding.normal_rows, NOISE)),
        ]
        self._own = [vars(target).get(method) for target, method, _ in self._watched]
        for target, method, watched in self._watched:
            setattr(target, method, watched)

    def stop(self) -> dict[str, dict[str, float]]:
        """Leave the runner as it was. By part, seconds, and the rows that mix: "decoding", the mean of all steps that have logits;
        "mixing", the median of those that mix as many rows as any did, some of which still prefill. And the number of "steps".
        """
        for (target, method, _), own in zip(self._watched, self._own, strict=True):
            if own is None:
                delattr(target, method)  # uncovers the class's
            else:
                setattr(target, method, own)
        decoding = [step for step in self._steps if step[ADVANCE]]
        mixing = [step for step in decoding if step["rows"]]
        fullest = [step for step in mixing if step["rows"] == max(step["rows"] for step in mixing)]
        return {"decoding": _over(decoding, mean), "mixing": _over(fullest, median)}

    def _timed(self, method: Callable[..., Any], part: str, begins: bool = False) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if begins:
                self._steps.append(dict.fromkeys((*PARTS, "rows"), 0.0))
            begun = _now()
            try:
                return method(*args, **kwargs)
            finally:
                if self._steps:  # else the profile began within a step
                    self._steps[-1][part] += _now() - begun

        return timed

    def _counted(self, mix: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(mix)
        def counted(rows: Any, wanted: Tensor, *args: Any) -> Any:
            if self._steps:
                self._steps[-1]["rows"] += int(wanted.sum())
            return mix(rows, wanted, *args)

        return counted


def _over(steps: list[dict[str, float]], average: Callable[[list[float]], float]) -> dict[str, float]:
    return {"steps": len(steps)} | {part: average([step[part] for step in steps]) for part in (*PARTS, "rows") if steps}


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
