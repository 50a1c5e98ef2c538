"""The `softrl` command. Exit codes: 0 done, 1 failed while running, 2 bad input. Heavy imports wait until a command needs them."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.errors import InputError, RunError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="RL of models that think in soft tokens."
)
bench = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
app.add_typer(bench, name="bench")

INTERRUPTED = 130  # Typer's exit code after Ctrl-C; ours are 0, 1 and 2

ConfigPath = Annotated[Path, typer.Argument(help="a YAML recipe, e.g. configs/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value settings, e.g. policy.mode=fuzzy")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's newest checkpoint")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the resolved config, start nothing")] = False,
    replay: Annotated[Path | None, typer.Option(help="learn from rollouts written by `softrl rollout`")] = None,
) -> None:
    """Train a model: rollouts, learning and weight pushes on one machine or a Ray cluster."""
    from configs.load import dump_config, load_config

    resolved = load_config(config, overrides or [])
    if replay is not None and (resume or dry_run):
        raise InputError("--replay goes with neither --resume nor --dry-run; leave those out")
    if dry_run:
        from cluster.controller import prepare

        model_dir, problems, validation, test = prepare(resolved)
        print(dump_config(resolved), end="")
        print(f"# model at {model_dir}; {len(problems)} training, {len(validation)} validation, {len(test)} test problems")
        print("# nothing was started")
    elif replay is not None:
        from cluster import offline

        offline.replay(resolved, replay)
    else:
        from cluster.controller import train as run_training

        run_training(resolved, resume)


@app.command()
def rollout(
    config: ConfigPath, out: Annotated[Path, typer.Option(help="folder for the trajectories")], overrides: Overrides = None
) -> None:
    """Draw rollouts only, and write them to files."""
    from cluster import offline
    from configs.load import load_config

    offline.write(load_config(config, overrides or []), out)


@app.command("eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[Path | None, typer.Option(help="RUN/checkpoints/step_N, or an exported model; unset: model.path")] = None,
    settings: Annotated[
        str | None, typer.Option(help="all, or names such as hard_greedy,soft_sample; unset: eval.settings")
    ] = None,
    datasets: Annotated[
        str | None,
        typer.Option(help="tasks, ood, hellaswag, mmlu, arc_easy, arc_challenge (=FILE); choices=FILE; else task.test"),
    ] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="of each data set, the first ones; unset: all")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the results; unset: the checkpoint's run, or run.dir/run.name")
    ] = None,
) -> None:
    """Evaluate: pass@k under the six inference settings, and multiple choice. The same command goes on after Ctrl-C."""
    from cluster.eval_sets import load_datasets
    from cluster.evaluate import run_evaluation
    from configs.load import load_config
    from configs.schema import EVAL_SETTINGS

    names = ", ".join(EVAL_SETTINGS) if settings == "all" else settings
    chosen = [] if names is None else [f"eval.settings=[{names}]"]
    resolved = load_config(config, [*(overrides or []), *chosen])
    sets = load_datasets(resolved, None if datasets is None else datasets.split(","), problems)
    run_evaluation(resolved, checkpoint, sets, out)


@app.command()
def export(checkpoint: Path, out: Path) -> None:
    """Turn a checkpoint of a run into an ordinary Hugging Face model folder."""
    from configs.load import load_config
    from learner.export import export as export_checkpoint

    run_config = checkpoint.resolve().parent.parent / "config.yaml"
    if not run_config.exists():
        raise InputError(f"{checkpoint}: no run around it (expected {run_config}); give a folder runs/NAME/checkpoints/step_N")
    export_checkpoint(checkpoint, out, load_config(run_config))
    print(f"wrote {out}: load it with transformers or vLLM like any other model")


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="a folder of run folders, e.g. runs")],
    out: Annotated[Path | None, typer.Option(help="folder for the report; unset: RUNS/report")] = None,
) -> None:
    """Tables and figures of a folder of runs, the paper's numbers beside ours."""
    from cluster.report import report as write_report

    write_report(runs, out)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="a run's folder, e.g. runs/first")],
    problem: Annotated[int, typer.Option(min=0, help="its place in the data set, from 0; an evaluation keeps the first few")] = 0,
    setting: Annotated[str | None, typer.Option(help="such as soft_sample; unset: all that were evaluated")] = None,
    evaluation: Annotated[str | None, typer.Option(help="such as test_000040_gsm8k_test; unset: of the newest weights")] = None,
    html: Annotated[Path | None, typer.Option(help="write one HTML page instead")] = None,
) -> None:
    """What the model thought on a problem, with the mixture behind each soft token."""
    from cluster.show import show as show_transcripts

    show_transcripts(run, problem, setting, evaluation, html)


@app.command()
def matrix(
    path: Annotated[Path, typer.Argument(metavar="MATRIX", help="recipes and axes, e.g. configs/matrix/small.yaml")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and list the runs, start nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with runs that were begun and not finished")] = False,
) -> None:
    """Train and evaluate every combination of a few settings, one after another, and report them."""
    from cluster.matrix import matrix as run_matrix

    run_matrix(path, dry_run, resume)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="as model.path: smollm2-135m, a Hugging Face id, or a checkpoint's folder")],
    max_cot_tokens: Annotated[int | None, typer.Option(min=1, help="L of a request at most; unset: 512")] = None,
    max_answer_tokens: Annotated[int | None, typer.Option(min=1, help="of a request at most; unset: 32")] = None,
) -> None:
    """Serve a model in soft, fuzzy and hard tokens through vLLM's OpenAI API. Options of `vllm serve` may follow."""
    from cluster.serve import serve as become_server

    limits = {"max_cot_tokens": max_cot_tokens, "max_answer_tokens": max_answer_tokens}
    become_server(model, {name: limit for name, limit in limits.items() if limit is not None}, context.args)


@app.command()
def doctor(model: Annotated[str, typer.Option(help="the model you mean to train")] = "smollm2-135m") -> None:
    """Check this machine's installation, and say what to do about what is wrong."""
    from cluster.doctor import diagnose, print_report

    raise typer.Exit(print_report(diagnose(model)))


@bench.command("rollout")
def bench_rollout(
    config: Annotated[Path, typer.Option(help="recipe that names the model and the engine")] = Path("configs/demo.yaml"),
    overrides: Overrides = None,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
    sequences: Annotated[int, typer.Option(min=1)] = 64,
    profile: Annotated[bool, typer.Option("--profile", help="also softrl's share of an engine step")] = False,
) -> None:
    """Tokens per second: soft and hard in one engine, and a plain PyTorch loop."""
    from cluster.bench_rollout import bench_rollout as run_bench
    from cluster.bench_rollout import print_bench, write_bench
    from configs.load import load_config

    figures = run_bench(load_config(config, overrides or []), sequences=sequences, profile=profile)
    print_bench(figures)
    if json is not None:
        write_bench(json, figures)


@bench.command("kernels")
def bench_kernels(json: Annotated[Path | None, typer.Option(help="write the figures here")] = None) -> None:
    """Time and peak memory of the learner's log-probabilities, and the time of the mixture; minutes on two cores."""
    from cluster.bench_kernels import bench_kernels as run_bench
    from cluster.bench_kernels import print_kernels
    from cluster.bench_rollout import write_bench

    figures = run_bench()
    print_kernels(figures)
    if json is not None:
        write_bench(json, figures)


@bench.command("learner")
def bench_learner(
    config: Annotated[Path, typer.Option(help="recipe that names the model and the batch")] = Path("configs/demo.yaml"),
    overrides: Overrides = None,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Tokens per second, peak memory and parts of one optimiser step, with soft tokens and with hard ones."""
    from cluster.bench_learner import bench_learner as run_bench
    from cluster.bench_learner import print_learner
    from cluster.bench_rollout import write_bench
    from configs.load import load_config

    figures = run_bench(load_config(config, overrides or []))
    print_learner(figures)
    if json is not None:
        write_bench(json, figures)


def main() -> None:
    """Entry point: every expected failure ends in one line on stderr and its exit code."""
    console = Console(stderr=True, soft_wrap=True)
    if sys.argv[1:2] != ["serve"]:  # a server's log is its only sign of life
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM reads it when a command first imports it
    try:
        app()
    except (InputError, RunError) as error:
        console.print(f"softrl: {error}", style="red", highlight=False, markup=False)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        console.print("softrl: interrupted", style="yellow")
        sys.exit(1)


if __name__ == "__main__":
    main()
