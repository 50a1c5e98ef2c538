"""Two engines and two learner ranks, as real actors of one run: what they learn is what one engine and one rank learn."""

from pathlib import Path

import pytest

from tests.end_to_end.commands import SMALL, events, reader_folder, rows, softrl

SAME = ("reward/mean", "reward/correct", "rollout/tokens", "learner/loss", "learner/grad_norm", "learner/residual_mean")
SHORT = [*SMALL, "run.steps=2", "rollout.prompts_per_step=4", "eval.problems=4", "push.verify_every=1"]

pytestmark = [pytest.mark.slow, pytest.mark.study, pytest.mark.timeout(1800)]


def test_two_engines_and_two_ranks_are_one_of_each(tmp_path: Path) -> None:
    folder = reader_folder(tmp_path)
    train = ["train", "configs/demo.yaml"]
    softrl(folder, train, *SHORT, "run.name=one")
    softrl(folder, train, *SHORT, "run.name=many", "engine.count=2", "learner.ranks=2")
    one, many = rows(folder / "runs/one"), rows(folder / "runs/many")
    assert [row["step"] for row in many] == [1, 2]
    for ours, theirs in zip(many, one, strict=True):
        for key in SAME:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)
    # Both engines were compared with the learner after every push: the larger distance is recorded.
    verified = events(folder / "runs/many", "push_verified")
    assert [event["version"] for event in verified] == [0, 1, 2]
    assert all(event["logprob_distance"] <= 1e-4 for event in verified)
