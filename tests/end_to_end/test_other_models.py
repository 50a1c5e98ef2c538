"""The models of the paper that the tiny Llama is not like: a head of its own (Llama-3.1-8B), biases in attention (Qwen2.5)."""

from collections.abc import Iterator

import numpy as np
import pytest

from configs.schema import Mode
from tests.end_to_end.conftest import Rig, problems, started
from tests.end_to_end.test_engine import learn, requests
from tests.tiny_model import make_tiny_llama, make_tiny_qwen2

pytestmark = [pytest.mark.slow, pytest.mark.study]

MODELS = {"llama untied": lambda folder: make_tiny_llama(folder, hidden=128, tied=False), "qwen2.5": make_tiny_qwen2}


@pytest.fixture(scope="module", params=MODELS)
def other(request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with started(MODELS[request.param](tmp_path_factory.mktemp("model"))) as rig:
        yield rig


def test_engine_and_learner_agree_before_and_after_a_push(other: Rig) -> None:
    fixed = [other.rollouts.prompt_ids(problem) for problem in problems(4)]
    before = np.concatenate(other.call(other.engine.token_logprobs.remote(fixed)))
    for step in (0, 1):
        drawn = [t for mode in Mode for t in other.draw(requests(other, mode, {Mode.hard: 1.0, Mode.soft: 0.5}.get(mode, 1e-4), 2))]
        metrics = learn(other, drawn, step)
        assert metrics["learner/mismatch_s_p99"] < 0.05
        assert metrics["learner/residual_mean"] == pytest.approx(1.0, abs=0.01)
        assert metrics["learner/answer_logprob_gap_mean"] < 1e-4
        other.call(other.learner.push.remote(step + 1))
        assert other.call(other.learner.verify.remote(step + 1)) <= 1e-4
    after = np.concatenate(other.call(other.engine.token_logprobs.remote(fixed)))
    assert np.abs(after - before).max() > 1e-4
