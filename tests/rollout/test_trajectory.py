"""Which requests no engine can decode with."""

from typing import Any

import numpy as np
import pytest

from configs.schema import Mode
from rollout.trajectory import SampleRequest, impossible


def a_request(**fields: Any) -> SampleRequest:
    usual: dict[str, Any] = {
        "prompt_ids": np.arange(5, dtype=np.int32), "prompt_index": 8, "sample_index": 0, "mode": Mode.soft, "tau": 0.5,
        "sigma": 0.1, "seed": 3, "max_cot_tokens": 6, "max_answer_tokens": 3, "answer_temperature": 1.0,
    }  # fmt: skip
    return SampleRequest(**usual | fields)


@pytest.mark.parametrize(
    ("mode", "fields", "expected"),
    [
        (Mode.soft, {"tau": 0.0}, "a finite number of at least 1e-05 in soft mode"),
        (Mode.fuzzy, {"tau": 0.0}, "a finite number of at least 1e-05 in fuzzy mode"),
        (Mode.soft, {"tau": 1e-50}, "a finite number of at least 1e-05 in soft mode"),  # 0 in float32
        (Mode.fuzzy, {"tau": float("nan")}, "a finite number of at least 1e-05 in fuzzy mode"),
        (Mode.hard, {"tau": float("nan")}, "a finite number of at least 1e-05, or 0 in hard mode"),
        (Mode.hard, {"tau": float("inf")}, "a finite number of at least 1e-05, or 0 in hard mode"),
        (Mode.hard, {"tau": -1.0}, "a finite number of at least 1e-05, or 0 in hard mode"),
        (Mode.soft, {"sigma": -0.1}, "a finite number of at least 0"),
        (Mode.fuzzy, {"sigma": float("nan")}, "a finite number of at least 0"),
        (Mode.soft, {"sigma": float("inf")}, "a finite number of at least 0"),
        (Mode.hard, {"answer_temperature": float("nan")}, "a finite number of at least 0"),
        (Mode.soft, {"seed": 2**63}, "a whole number from 0 to 2**63 - 1"),
        (Mode.soft, {"seed": -1}, "a whole number from 0 to 2**63 - 1"),
        (Mode.soft, {"max_cot_tokens": 0}, "at least 1"),
        (Mode.hard, {"max_answer_tokens": -1}, "at least 1"),
    ],
)
def test_the_field_that_cannot_be_is_named(mode: Mode, fields: dict[str, Any], expected: str) -> None:
    ((name, value),) = fields.items()
    assert impossible(a_request(mode=mode, **fields)) == (name, value, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": Mode.hard, "tau": 0.0, "sigma": 0.0},  # greedy
        {"tau": 3.0, "sigma": 0.0, "answer_temperature": 0.0},
        {"mode": Mode.fuzzy, "tau": 1e-5, "seed": 2**63 - 1, "max_cot_tokens": 1, "max_answer_tokens": 1},
    ],
)
def test_greedy_and_extreme_requests_are_possible(fields: dict[str, Any]) -> None:
    assert impossible(a_request(**fields)) is None
