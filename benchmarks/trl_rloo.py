"""The learner's optimiser step beside that of TRL's RLOOTrainer: same model, same tokens, same arithmetic, one process each.

    python3 -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 transformers==5.19.0 trl==1.16.0     (a CPU build of torch)
    .venv/bin/python -m benchmarks.trl_rloo --trl /tmp/trl/bin/python --json benchmarks/results/learner_cpu.json

    driver    trl, hard, soft, trl, hard, soft, ...    one step at a time: one process works while the other waits
    trl       RLOOTrainer.train(), whole: TRL's padding, loss, clip, AdamW; only generating is replaced, by given completions
    softrl    learner.learner.Learner, whole: `hard` learns from the very same tokens, `soft` from as many soft ones

Alike on both sides: float32 weights, gradients and products, no activation checkpointing, samples to a micro-batch, threads, RLOO
advantages, gradients clipped to a norm of 1, AdamW at learning rate 0, so that every step is the same. Both gradient norms are in
the figures: they are the same gradient. Left out of TRL's time, because softrl has no such thing: its forward passes for old and
for reference log-probs (beta is 0). Completions are equally long, which spares TRL its padding. On a CPU TRL also scores the
prompt's positions, "so as not to recompile" (trl/trainer/utils.py); `trl_completions` is TRL with that one choice made as on a
GPU. Memory is the resident set of a process at its most during a step, its libraries included, and at rest before its first.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

THREADS = 2
MICRO_BATCH = 8  # samples
SIDES = ("trl", "trl_completions", "hard", "soft")
OURS = ("hard", "soft")
CASES = {  # prompts of the demo's sums with the paper's text, 90 tokens; CoT and answer as in the demo and as in the paper
    "demo": {"prompts": 2, "samples": 8, "cot": 14, "answer": 8},
    "paper": {"prompts": 1, "samples": 8, "cot": 128, "answer": 32},
}


def main() -> None:
    """The driver, or one of the two processes that it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="Python of an environment with trl")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--model", default="smollm2-135m", help="as model.path")
    parser.add_argument("--work", nargs=2, metavar=("PROGRAM", "FOLDER"), help="what the driver starts")
    arguments = parser.parse_args()
    if arguments.work:
        program, folder = arguments.work
        {"trl": work_trl, "softrl": work_softrl}[program](Path(folder))
        return
    path = arguments.json
    figures = json.loads(path.read_text()) if path is not None and path.exists() else {}  # other cases stay
    for name in arguments.cases.split(","):
        case = figures[name] = compare(CASES[name] | {"model": arguments.model}, arguments.trl, arguments.rounds)
        for side in SIDES:
            speed, peak = case["tokens_per_s"][side], case["peak_bytes"][side] / 2**30
            print(f"{name:6} {side:16} {speed:7.0f} tokens/s   peak {peak:.2f} GiB", flush=True)
        print(f"{name:6} over trl: {case['over_trl']}   over trl_completions: {case['over_trl_completions']}", flush=True)
        if path is not None:
            path.write_text(json.dumps(figures, indent=1) + "\n")


# The driver


def compare(case: dict[str, Any], trl_python: str, rounds: int) -> dict[str, Any]:
    """A case's figures: all sides, a step each in turn."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "case.json").write_text(json.dumps(case | {"steps": 2 * (rounds + 1)}))
        ours = Worker(sys.executable, "softrl", folder)  # writes the batch
        theirs = Worker(trl_python, "trl", folder)
        steps: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(rounds + 1):
            for side in SIDES:
                steps[side].append((ours if side in OURS else theirs).ask(side))
        for worker in (ours, theirs):
            worker.close()
    timed = {side: found[1:] for side, found in steps.items()}  # the first warms up
    seconds = {side: [step["seconds"] for step in timed[side]] for side in SIDES}

    def ratios(base: str) -> dict[str, float]:
        return {side: median(b / s for b, s in zip(seconds[base], seconds[side], strict=True)) for side in OURS}

    return {
        "over_trl": ratios("trl"),
        "over_trl_completions": ratios("trl_completions"),
        "tokens_per_s": {side: ours.report["tokens"] / median(seconds[side]) for side in SIDES},
        "seconds": seconds,
        "peak_bytes": {side: max(int(step["peak_bytes"]) for step in timed[side]) for side in SIDES},
        "gradient_norm": {side: timed[side][0]["gradient_norm"] for side in SIDES},
        "processes": {"softrl": ours.report, "trl": theirs.report},  # memory at rest, versions, what each did
        "case": case | {"threads": THREADS, "micro_batch_samples": MICRO_BATCH, "dtype": "float32"},
    }


class Worker:
    """A process that takes one step for each line it reads, and answers with a line of JSON."""

    def __init__(self, python: str, program: str, folder: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
        self.command = [python, str(Path(__file__).resolve()), "--work", program, folder]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.report = self._answer()

    def ask(self, side: str) -> dict[str, float]:
        """One step of `side`."""
        assert self.process.stdin is not None
        print(side, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Wait for the process to end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"trl_rloo: `{' '.join(self.command)}` ended; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


# softrl's process


def work_softrl(folder: Path) -> None:
    """Writes batch.json for the other process, then takes steps."""
    import torch

    from cluster.bench_learner import make_groups, make_prompts, one_rank, run_step
    from configs.load import load_config
    from configs.schema import Mode
    from learner.learner import Learner
    from rollout.models import resolve_model

    case = json.loads((folder / "case.json").read_text())
    config = load_config(
        Path(__file__).resolve().parents[1] / "configs/demo.yaml",
        [
            f"model.path={case['model']}",
            f"rollout.prompts_per_step={case['prompts']}",
            f"rollout.samples_per_prompt={case['samples']}",
            f"policy.max_cot_tokens={case['cot']}",
            f"policy.max_answer_tokens={case['answer']}",
            "engine.max_model_len=1024",
            "learner.lr=0",
            "learner.cot_weight=1",
        ],
    )
    prompts = make_prompts(config)
    completion = case["cot"] + case["answer"]
    config.learner.micro_batch_tokens = max(map(len, prompts)) + MICRO_BATCH * (completion - 1)
    model = resolve_model(config.model.path)
    answer = own_stdout()
    torch.set_num_threads(THREADS)
    with one_rank() as device:
        learner = Learner(config, model, 0, 1, device)
        sigma = config.policy.gamma * learner.rms_embedding()
        groups = {side: make_groups(config, Mode(side), prompts, [], len(learner.policy.head), sigma) for side in OURS}
        batch = {
            "model": str(model),
            "prompts": prompts,
            "completions": [
                [s.trajectory.shadow_ids.tolist() + s.trajectory.answer_ids.tolist() for s in group.samples]
                for group in groups["hard"]
            ],
            "rewards": [[s.reward for s in group.samples] for group in groups["hard"]],
        }
        (folder / "batch.json").write_text(json.dumps(batch))
        samples = sum(len(group.samples) for group in groups["hard"])
        lengths = {"prompt_tokens": max(map(len, prompts)), "tokens": samples * completion}
        answer(lengths | report("torch", "transformers"))
        for side in sys.stdin:
            reset_peak()
            begun = time.perf_counter()
            metrics = run_step(learner, groups[side.strip()])
            seconds = time.perf_counter() - begun
            answer({"seconds": seconds, "peak_bytes": status("VmHWM"), "gradient_norm": metrics["learner/grad_norm"]})


# TRL's process


def work_trl(folder: Path) -> None:
    """RLOOTrainer.train() on the batch, a step for each line read."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer
    from trl.trainer import utils

    batch, case = (json.loads((folder / name).read_text()) for name in ("batch.json", "case.json"))
    samples = case["prompts"] * case["samples"]
    answer = own_stdout()
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(batch["model"], dtype=torch.float32)
    settings = RLOOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=samples // MICRO_BATCH,
        num_generations=case["samples"],
        max_completion_length=case["cot"] + case["answer"],
        max_steps=case["steps"],
        beta=0.0,
        learning_rate=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    step: dict[str, Any] = {}
    on_gpu = utils._use_triton

    class Steps(TrainerCallback):
        """Waits for the driver before a step, and reports it after."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            side = sys.stdin.readline().strip()
            utils._use_triton = on_gpu if side == "trl" else lambda _device: True  # score completions only, as on a GPU
            reset_peak()
            step["begun"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = time.perf_counter() - step["begun"]
            answer({"seconds": seconds, "peak_bytes": status("VmHWM"), "gradient_norm": float(step["norm"])})

    trainer = RLOOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["not read"] * case["prompts"]}),
        processing_class=AutoTokenizer.from_pretrained(batch["model"]),
        callbacks=[Steps()],
    )
    clip = trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda model: step.setdefault("norm", clip(model))
    trainer._generate_and_score_completions = given_completions(trainer, batch)
    answer(report("torch", "transformers", "trl"))
    trainer.train()


def given_completions(trainer: Any, batch: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
    """What RLOOTrainer._generate_and_score_completions returns, of the given tokens: padded by TRL, with its advantages."""
    import torch
    from trl.trainer.utils import pad

    count = len(batch["completions"][0])
    prompts = [torch.tensor(prompt) for prompt in batch["prompts"] for _ in range(count)]
    completions = [torch.tensor(ids) for group in batch["completions"] for ids in group]
    rewards = torch.tensor(batch["rewards"])
    advantages = (rewards - (rewards.sum(1, keepdim=True) - rewards) / (count - 1)).flatten()
    old_logps: list[Any] = []

    def padded() -> dict[str, Any]:
        filler = trainer._tokenizer.pad_token_id
        return {
            "prompt_ids": pad(prompts, filler, "left"),
            "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
            "completion_ids": pad(completions, filler, "right"),
            "completion_mask": pad([torch.ones_like(ids) for ids in completions], 0, "right"),
            "advantages": advantages,
        }

    @torch.no_grad()
    def logps(inputs: dict[str, Any]) -> Any:
        ids, mask = (torch.cat([inputs[f"{part}_{what}"] for part in ("prompt", "completion")], 1) for what in ("ids", "mask"))
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].size(1), MICRO_BATCH)
        return (found[0] * inputs["completion_mask"]).sum(1)

    def given(_inputs: Any) -> dict[str, Any]:
        inputs = padded()
        if not old_logps:  # in the step that warms up; the weights never change
            old_logps.append(logps(inputs))
        return inputs | {"old_logps": old_logps[0]}

    return given


# Both processes


def own_stdout() -> Callable[[dict[str, Any]], None]:
    """Writes lines of JSON to what was stdout; whatever a library prints goes to stderr from now on."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda answer: print(json.dumps(answer), file=lines, flush=True)


def report(*packages: str) -> dict[str, Any]:
    """A process before its first step."""
    return {"resting_bytes": status("VmRSS"), "versions": {name: importlib.metadata.version(name) for name in packages}}


def reset_peak() -> None:
    """VmHWM starts anew from the present."""
    Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
