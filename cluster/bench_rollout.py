"""`softrl bench rollout`: what soft tokens cost, and what the engine gains over a plain PyTorch loop.

    one vLLM engine     soft, hard, hard, soft, ...   a step's worth of the recipe: its prompts, group size and lengths
    then, on the same   plain loop, plain loop, ...   (cluster/plain_loop.py) in a process of its own, the engine gone
    cores or GPU

A speed is decoded positions (CoT, forced prefill, answer) per second, from the first request to the last trajectory. Soft over
hard is the median of the rounds' ratios: the two stand side by side in time, so a machine that slows down slows down both.
"""

import importlib.metadata
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import ray.exceptions
from rich.console import Console

from cluster.bench_kernels import processor
from cluster.live import make_table
from cluster.placement import cores, placed, process_environment, ray_session
from cluster.plain_loop import PlainLoopSpeed, time_plain_loop
from cluster.waits import actor_errors
from configs.errors import RunError
from configs.schema import TAU_OF_MODE, Config, Mode
from rollout.files import replace_file
from rollout.models import load_tokenizer, resolve_model
from rollout.prompt import PREFILL_AT_LIMIT, render
from rollout.step_profile import ADVANCE, MIX, NOISE, OVERLAY, STEP
from rollout.tasks import load_task
from rollout.trajectory import SampleRequest, Trajectory

WARM_UP_TOKENS = 4
PLAIN_LOOP_ROUNDS = 3
PLAIN_LOOP_TIMEOUT_S = 3600.0


def bench_rollout(config: Config, *, sequences: int = 64, rounds: int = 8, profile: bool = False) -> dict[str, Any]:
    """Measure with the model, engine, prompts, lengths and policy of a recipe; `sequences` requests are decoded at once. With
    `profile`, one more round of either mode is timed from inside the engine (rollout/step_profile.py).

    Raises RunError when the engine or the loop fails.
    """
    config = _bench_config(config, sequences)
    model_dir = str(resolve_model(config.model.path))
    tokenizer = load_tokenizer(config.model.path)
    problems, group = load_task(config.task.train), config.rollout.samples_per_prompt
    questions = [problems[(i // group) % len(problems)].question for i in range(sequences)]
    prompts = [tokenizer.encode(render(config.task.prompt, question)) for question in questions]
    with ray_session(config):
        with placed(config, model_dir, with_learner=False) as cluster, actor_errors("bench: the engine"):
            engine = cluster.engines[0]
            report = ray.get(engine.start.remote(), timeout=config.engine.start_timeout_s)
            sigma = config.policy.gamma * float(report["rms_embedding"])
            speeds, decoded = _alternate(engine, config, prompts, sigma, rounds)
            profiles = {"profile": _profile(engine, config, prompts, sigma)} if profile else {}
        prefill = tokenizer.encode(PREFILL_AT_LIMIT, add_special_tokens=False)
        # The loop decodes as many answer tokens as the engine's answers had on average; in truth it waits for the longest.
        answer = max(1, round(decoded["soft"] / sequences) - config.policy.max_cot_tokens - len(prefill))
        plain = _plain_loop(config, model_dir, prompts, prefill, sigma, min(rounds, PLAIN_LOOP_ROUNDS), answer)
    soft, hard = speeds[_soft_mode(config)], speeds[Mode.hard]
    return {
        "soft_over_hard": median(s / h for s, h in zip(soft, hard, strict=True)),
        "soft_over_plain_loop": median(soft) / median(plain.tokens_per_s),
        "soft_tokens_per_s": median(soft),
        "hard_tokens_per_s": median(hard),
        "plain_loop_tokens_per_s": median(plain.tokens_per_s),
        "rounds": {"soft": soft, "hard": hard, "plain_loop": plain.tokens_per_s},
        "positions": decoded | {"plain_loop": plain.positions},  # decoded in a round
        "device": _device(plain),
        "model": config.model.path,
        "dtype": str(config.engine.dtype),
        "versions": _versions(report),
        "sequences": sequences,
        "lengths": {
            "prompt": max(map(len, prompts)),
            "group": group,
            "cot": config.policy.max_cot_tokens,
            "prefill": len(prefill),
            "answer": answer,
        },
        "policy": {"mode": str(_soft_mode(config)), "tau": _tau(config, _soft_mode(config)), "sigma": sigma},
        **profiles,
    }


def print_bench(figures: dict[str, Any], console: Console | None = None) -> None:
    """The figures as a table."""
    console = console or Console()
    hard = figures["hard_tokens_per_s"]
    rows = [
        [label, f"{figures[key]:,.0f}", f"{figures[key] / hard:.2f}", "  ".join(f"{x:,.0f}" for x in figures["rounds"][name])]
        for label, key, name in (
            ("vLLM, soft tokens", "soft_tokens_per_s", "soft"),
            ("vLLM, hard tokens", "hard_tokens_per_s", "hard"),
            ("plain PyTorch loop, soft tokens", "plain_loop_tokens_per_s", "plain_loop"),
        )
    ]
    lengths = figures["lengths"]
    batch = (
        f"{figures['sequences']} sequences, {lengths['group']} to a prompt of {lengths['prompt']} tokens, "
        f"{lengths['cot']} CoT + {lengths['prefill']} forced + {lengths['answer']} answer tokens"
    )
    console.print(f"{figures['model']} ({figures['dtype']}), {batch}, on {figures['device']}", highlight=False, soft_wrap=True)
    console.print(make_table("", ["", "tokens/s", "of hard", "rounds"], rows))
    console.print(
        f"soft over hard {figures['soft_over_hard']:.3f} (median of the rounds' ratios), "
        f"soft over plain loop {figures['soft_over_plain_loop']:.2f}",
        highlight=False,
    )
    for mode, part in figures.get("profile", {}).items():
        console.print(
            f"softrl's share of a {mode} step {part['hook_share']:.1%}: {part['advance_ms']:.2f} ms from logits to the next input, "
            f"{part['overlay_ms']:.2f} ms to lay it over, of {part['step_ms']:.1f} ms",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if mixing := part["mixing"]:
            console.print(
                f"mixing {mixing['rows']:.0f} rows: {mixing['mixture_ms']:.2f} ms, {mixing['mixture_share']:.1%} of a step of "
                f"{mixing['step_ms']:.1f} ms; their noise {mixing['noise_ms']:.2f} ms, {mixing['noise_share']:.1%}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip


def write_bench(path: Path, figures: dict[str, Any]) -> None:
    """The figures as JSON. Raises RunError when the file cannot be written."""
    replace_file(path, lambda partial: partial.write_text(json.dumps(figures, indent=1) + "\n"))


# The engine


def _alternate(
    engine: Any, config: Config, prompts: list[list[int]], sigma: float, rounds: int
) -> tuple[dict[Mode, list[float]], dict[str, int]]:
    """Tokens per second of each round and mode, and the positions a round decodes."""
    modes = (_soft_mode(config), Mode.hard)
    warm_up = min(WARM_UP_TOKENS, config.policy.max_cot_tokens)  # an engine refuses more than it was started for
    for mode in modes:
        _batch(engine, _requests(config, mode, prompts, sigma, warm_up, seed=0))
    speeds: dict[Mode, list[float]] = {mode: [] for mode in modes}
    lengths: dict[str, int] = {}
    for round_ in range(rounds):
        for mode in modes if round_ % 2 == 0 else modes[::-1]:
            begun = time.perf_counter()
            cot_tokens = config.policy.max_cot_tokens
            trajectories = _batch(engine, _requests(config, mode, prompts, sigma, cot_tokens, seed=1 + round_))
            seconds = time.perf_counter() - begun
            decoded = sum(trajectory.generated for trajectory in trajectories)
            speeds[mode].append(decoded / seconds)
            lengths["hard" if mode is Mode.hard else "soft"] = decoded
    return speeds, lengths


def _profile(engine: Any, config: Config, prompts: list[list[int]], sigma: float) -> dict[str, dict[str, Any]]:
    """By mode: milliseconds of a step and of its parts (rollout.step_profile), the share of softrl's two hooks; and of the steps
    that mix the most rows, where there are any, the shares of the mixtures and of their noise."""
    found = {}
    for mode in (_soft_mode(config), Mode.hard):
        ray.get(engine.profile.remote(True))
        _batch(engine, _requests(config, mode, prompts, sigma, config.policy.max_cot_tokens, seed=0))
        spent = ray.get(engine.profile.remote(False))
        decoding, mixing = spent["decoding"], spent["mixing"]
        found[str(mode)] = {
            "steps": decoding["steps"],
            **{f"{part}_ms": 1000 * decoding[part] for part in (STEP, OVERLAY, ADVANCE)},
            "hook_share": (decoding[OVERLAY] + decoding[ADVANCE]) / decoding[STEP],
            "mixing": _mixing_shares(mixing) if mixing["steps"] else None,
        }
    return found


def _mixing_shares(spent: dict[str, float]) -> dict[str, float]:
    parts = {"step": spent[STEP], "mixture": spent[MIX] - spent[NOISE], "noise": spent[NOISE]}
    return {
        "steps": spent["steps"],
        "rows": spent["rows"],
        **{f"{part}_ms": 1000 * seconds for part, seconds in parts.items()},
        **{f"{part}_share": parts[part] / parts["step"] for part in ("mixture", "noise")},
    }


def _batch(engine: Any, requests: list[SampleRequest]) -> list[Trajectory]:
    stream = engine.generate.options(num_returns="streaming").remote(requests)
    return [ray.get(ref) for ref in stream]  # the engine itself holds each request to engine.request_timeout_s


def _requests(
    config: Config, mode: Mode, prompts: list[list[int]], sigma: float, cot_tokens: int, seed: int
) -> list[SampleRequest]:
    return [
        SampleRequest(
            prompt_ids=np.array(prompt, dtype=np.int32),
            prompt_index=i,
            sample_index=0,
            mode=mode,
            tau=_tau(config, mode),
            sigma=0.0 if mode is Mode.hard else sigma,
            seed=(seed << 20) + i,
            max_cot_tokens=cot_tokens,
            max_answer_tokens=config.policy.max_answer_tokens,
            answer_temperature=config.rollout.answer_temperature,
        )
        for i, prompt in enumerate(prompts)
    ]


# The plain loop


def _plain_loop(
    config: Config, model_dir: str, prompts: list[list[int]], prefill: list[int], sigma: float, rounds: int, answer: int
) -> PlainLoopSpeed:
    """The baseline in a process of its own, with every core and GPU that the engine had."""
    gpus = min(1, ray.cluster_resources().get("GPU", 0))
    threads = len(cores(config.engine.threads))
    options = {
        "num_gpus": gpus,
        "max_retries": 0,
        "runtime_env": {"env_vars": process_environment(gpus) | {"OMP_NUM_THREADS": str(threads)}},
    }
    loop = ray.remote(time_plain_loop).options(**options)
    mode = _soft_mode(config)
    result = loop.remote(
        model_dir,
        prompts,
        prefill,
        tau=_tau(config, mode),
        sigma=sigma,
        cot_tokens=config.policy.max_cot_tokens,
        answer_tokens=answer,
        rounds=rounds,
        threads=threads,
        dtype=config.engine.dtype,
    )
    try:
        return ray.get(result, timeout=PLAIN_LOOP_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise RunError(f"bench: the plain loop did not finish within {PLAIN_LOOP_TIMEOUT_S:g} s; lower --sequences") from None


# What is measured, and where


def _bench_config(config: Config, sequences: int) -> Config:
    """The recipe with one engine that holds all sequences at once."""
    engine = replace(
        config.engine,
        count=1,
        max_num_seqs=max(sequences, config.engine.max_num_seqs),
    )
    return replace(config, engine=engine)


def _soft_mode(config: Config) -> Mode:
    return Mode.soft if config.policy.mode is Mode.hard else config.policy.mode


def _tau(config: Config, mode: Mode) -> float:
    own = config.policy.tau if config.policy.mode is mode else None
    return TAU_OF_MODE[mode] if own is None else own


def _device(plain: PlainLoopSpeed) -> str:
    if plain.device != "cpu":
        return plain.device
    return f"{processor()}, {plain.threads} threads"


def _versions(report: dict[str, Any]) -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "ray")}
    return {"vllm": report["vllm"], "runner": report["runner"], **packages}
