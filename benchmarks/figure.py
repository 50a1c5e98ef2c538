"""README's picture of what was measured, from the JSON files that the benchmarks wrote.

python -m benchmarks.figure        reads benchmarks/results/*_cpu.json, draws benchmarks/results/figure.png
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.paper_numbers import BASE
from cluster.report_figures import COLOURS, DPI, PANEL
from configs.schema import Mode
from rollout.files import replace_file

RESULTS = Path(__file__).parent / "results"
OTHERS, OTHERS_PALE = COLOURS[BASE], "#b4b4b4"  # what is not softrl
SIDES = {  # of benchmarks.trl_rloo: label, colour
    "trl": ("TRL's RLOO", OTHERS),
    "trl_completions": ("TRL, completions only", OTHERS_PALE),
    "hard": ("softrl, hard", COLOURS[Mode.hard]),
    "soft": ("softrl, soft", COLOURS[Mode.soft]),
}
FLOAT_BYTES = 4


def main() -> None:
    figure = draw(*load())
    replace_file(RESULTS / "figure.png", lambda partial: figure.savefig(partial, format="png", dpi=DPI))


def load() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What `softrl bench rollout`, benchmarks.trl_rloo and `softrl bench kernels` wrote."""

    def read(name: str) -> dict[str, Any]:
        return dict(json.loads((RESULTS / f"{name}_cpu.json").read_text()))

    return read("rollout"), read("learner"), read("kernels")


def draw(rollout: dict[str, Any], learner: dict[str, Any], kernels: dict[str, Any]) -> Figure:
    """A panel of each."""
    figure = Figure(figsize=(3 * PANEL[0], PANEL[1]), layout="constrained")
    decoding, learning, memory = figure.subplots(1, 3)
    _decoding(decoding, rollout)
    _learning(learning, learner)
    _memory(memory, kernels)
    return figure


def _decoding(axes: Axes, figures: dict[str, Any]) -> None:
    bars = {
        "plain PyTorch\nloop, soft": (figures["plain_loop_tokens_per_s"], OTHERS),
        "vLLM,\nhard": (figures["hard_tokens_per_s"], COLOURS[Mode.hard]),
        "softrl,\nsoft": (figures["soft_tokens_per_s"], COLOURS[Mode.soft]),
    }
    speeds, colours = zip(*bars.values(), strict=True)
    axes.bar_label(axes.bar(list(bars), speeds, color=colours, width=0.6), fmt="{:,.0f}")
    _finish(axes, f"decoding: tokens/s, {figures['sequences']} sequences, {figures['dtype']}")


def _learning(axes: Axes, figures: dict[str, Any]) -> None:
    measured = list(figures.values())
    width = 0.8 / len(SIDES)
    for place, (side, (label, colour)) in enumerate(SIDES.items()):
        at = [index + (place - (len(SIDES) - 1) / 2) * width for index in range(len(measured))]
        bars = axes.bar(at, [figure["tokens_per_s"][side] for figure in measured], width, color=colour, label=label)
        axes.bar_label(bars, fmt="{:,.0f}")
    cases = [figure["case"] for figure in measured]
    axes.set_xticks(range(len(cases)), [f"{case['cot']} CoT +\n{case['answer']} answer tokens" for case in cases])
    axes.legend(frameon=False, fontsize="small", ncols=2)
    axes.margins(y=0.35)  # room for the legend
    _finish(axes, f"learning: tokens/s of an optimiser step, {cases[0]['dtype']}")


def _memory(axes: Axes, figures: dict[str, Any]) -> None:
    lines = {
        "support": ("soft, recorded support", COLOURS[Mode.soft], "-"),
        "dense": ("soft, whole vocabulary", COLOURS[Mode.soft], "--"),
        "token": ("token", COLOURS[Mode.hard], "-"),
    }
    for name, (label, colour, style) in lines.items():
        peaks = {int(tokens): peak / 2**30 for tokens, peak in figures["memory"][name]["peak_bytes"].items()}
        axes.plot(list(peaks), list(peaks.values()), style, color=colour, marker="o", label=label)
    tokens = sorted(map(int, figures["memory"]["token"]["peak_bytes"]))
    vocabulary = figures["shape"]["vocabulary"]
    whole = [count * vocabulary * FLOAT_BYTES / 2**30 for count in tokens]
    axes.plot(tokens, whole, ":", color=OTHERS, marker="o", label="one [tokens, vocabulary] tensor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.legend(frameon=False, fontsize="small")
    _finish(axes, f"log-probs: peak GiB, vocabulary {vocabulary:,}, {figures['dtype']}", "tokens")


def _finish(axes: Axes, title: str, below: str = "") -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(below)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
