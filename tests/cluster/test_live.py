"""What a user reads of a run: every number of the step on a terminal, one ASCII line a step elsewhere."""

import io

import pytest
from rich.console import Console

from cluster.live import LiveView, duration, sparkline, time_split
from configs.load import load_config
from configs.schema import Config

ROW = {
    "step": 7,
    "reward/mean": 47.26,
    "reward/correct": 0.41,
    "rollout/tokens_per_s": 1624.6,
    "learner/tokens_per_s": 900.0,
    "learner/residual_mean": 1.0007,
    "time/step": 10.0,
    "time/wait_rollout": 6.0,
    "push/seconds": 1.0,
}


@pytest.fixture
def config() -> Config:
    sizes = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=8", "policy.gamma=0.33"]
    return load_config("configs/demo.yaml", ["run.name=sums", "run.steps=10", *sizes])


def console(terminal: bool, width: int = 100) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, record=True, color_system="truecolor" if terminal else None
    )


def seen(view: LiveView, width: int = 100) -> str:
    """The panel as text."""
    on = console(terminal=False, width=width)
    on.print(view.panel())
    return on.export_text()


def test_the_panel_holds_every_number_of_the_step(config: Config) -> None:
    with LiveView(config, console(terminal=True)) as view:
        view.step(ROW | {"step": 6, "reward/mean": 20.0, "eval/hard_greedy": 0.5})
        view.step(ROW)
        text = seen(view)
    for part in (
        "sums",
        "soft (tau 0.5, gamma 0.33), smollm2-135m, 8 prompts x 8 samples",
        "7/10",
        "ETA 30 s",
        "47.3  ▁█",
        "41.0%",
    ):
        assert part in text
    for part in (
        "rollout 1,625   learner 900",
        "1.0007",
        "wait for rollouts 60%  learn 30%  push 10%",
        "hard_greedy 50.0%   (step 6)",
    ):
        assert part in text


@pytest.mark.parametrize("width", [50, 80, 200])
def test_the_panel_fits_any_terminal(config: Config, width: int) -> None:
    view = LiveView(config, console(terminal=True))
    view.step(ROW | {"eval/hard_greedy": 0.5, "eval/soft_greedy": 0.5})
    lines = seen(view, width).splitlines()
    assert max(map(len, lines)) <= width and len(lines) < 20


def test_before_the_first_step_and_after_the_last(config: Config) -> None:
    view = LiveView(config, console(terminal=True))
    assert "0/10" in seen(view) and "starting" in seen(view) and "reward" not in seen(view)
    view.step(ROW | {"step": 10})
    assert "done" in seen(view) and "ETA" not in seen(view)


def test_notes_and_tables_stay_above_the_panel(config: Config) -> None:
    on = console(terminal=True)
    with LiveView(config, on) as view:
        view.note("pushed version 3 [bold]to 2 engines")
        view.table("Held-out accuracy", ["", "hard_greedy"], [["base model", "38 %"], ["after 7 steps", "61 %"]])
    text = on.export_text()
    assert "pushed version 3 [bold]to 2 engines" in text
    assert [line.split() for line in text.splitlines() if "base model" in line] == [["│", "base", "model", "│", "38", "%", "│"]]


def test_without_a_terminal_each_step_is_one_ascii_line(config: Config) -> None:
    on = console(terminal=False, width=40)
    with LiveView(config, on) as view:
        view.step(ROW | {"eval/hard_greedy": 0.5})
        view.step(ROW | {"step": 8})
    head, seventh, eighth = on.export_text().splitlines()
    assert head == "sums: soft (tau 0.5, gamma 0.33), smollm2-135m, 8 prompts x 8 samples"
    assert seventh == (
        "step 7/10 | reward 47.3 | correct 41.0% | rollout 1,625 tok/s | learner 900 tok/s | residual 1.0007 | "
        "10.0 s (wait for rollouts 60%, learn 30%, push 10%) | hard_greedy 50.0% | ETA 30 s"
    )
    assert eighth.isascii() and "hard_greedy" not in eighth


def test_what_was_not_measured_is_not_invented(config: Config) -> None:
    hard = load_config("configs/demo.yaml", ["policy.mode=hard"])
    view = LiveView(hard, console(terminal=True))
    view.step({"step": 1, "time/step": 2.0})
    assert "residual" not in seen(view) and "step time" not in seen(view) and "hard (tau 1)" in seen(view)
    assert "reward -" in view.line() and "residual -" in view.line()


def test_small_parts() -> None:
    assert sparkline([]) == "" and sparkline([3.0, 3.0]) == "▄▄" and sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert [duration(s) for s in (7.6, 250, 7500, 273_600)] == ["8 s", "4 min 10 s", "2 h 05 min", "3 d 4 h"]
    assert sum(time_split(ROW).values()) == pytest.approx(1.0)
    assert time_split({"time/step": 1.0, "time/wait_rollout": 1.01})["learn"] == 0.0  # clocks of two processes differ a little
