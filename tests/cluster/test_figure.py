"""README's picture draws the numbers that are in benchmarks/results, and nothing else."""

import pytest
from matplotlib.axes import Axes

from benchmarks import figure
from benchmarks.figure import RESULTS, SIDES


def heights(axes: Axes) -> list[float]:
    return [patch.get_height() for patch in axes.patches]


def test_the_picture_shows_every_recorded_number() -> None:
    rollout, learner, kernels = figure.load()
    decoding, learning, memory = figure.draw(rollout, learner, kernels).axes
    assert heights(decoding) == [rollout[f"{name}_tokens_per_s"] for name in ("plain_loop", "hard", "soft")]
    assert heights(learning) == [learner[case]["tokens_per_s"][side] for side in SIDES for case in learner]
    *drawn, whole = ({int(x): y for x, y in line.get_xydata()} for line in memory.lines)
    for peaks, name in zip(drawn, ("support", "dense", "token"), strict=True):
        assert peaks == {int(t): pytest.approx(b / 2**30) for t, b in kernels["memory"][name]["peak_bytes"].items()}
    assert whole[32_768] == pytest.approx(32_768 * 49_152 * 4 / 2**30)


def test_a_picture_is_written_whole(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in RESULTS.glob("*_cpu.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(figure, "RESULTS", tmp_path)
    figure.main()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial*"))
