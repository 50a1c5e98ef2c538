"""Every shipped recipe loads in every mode, and says what the paper says."""

from pathlib import Path

import pytest

import configs
from configs.load import dump_config, load_config
from configs.schema import Mode

FOLDER = Path(configs.__file__).parent
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "matrix")
PAPER = {  # model, learning rate, training set, L (paper, section 4.1)
    "llama-3.2-3b_gsm8k": ("meta-llama/Llama-3.2-3B-Instruct", 6e-6, "gsm8k", 128),
    "llama-3.2-3b_math": ("meta-llama/Llama-3.2-3B-Instruct", 6e-6, "math", 512),
    "llama-3.2-3b_deepscaler": ("meta-llama/Llama-3.2-3B-Instruct", 6e-6, "deepscaler", 512),
    "llama-3.1-8b_gsm8k": ("meta-llama/Llama-3.1-8B-Instruct", 3e-6, "gsm8k", 128),
    "qwen-2.5-3b_math": ("Qwen/Qwen2.5-3B-Instruct", 8e-6, "math", 512),
}


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_in_every_mode_and_back(path: Path, mode: Mode, tmp_path: Path) -> None:
    config = load_config(path, [f"policy.mode={mode}"])
    assert config.policy.mode is mode
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_is_the_papers_protocol(name: str) -> None:
    config = load_config(FOLDER / "paper" / f"{name}.yaml")
    assert (config.model.path, config.learner.lr, config.task.train, config.policy.max_cot_tokens) == PAPER[name]
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt, config.run.steps) == (2, 32, 4000)
    assert config.eval_cot_tokens == 512
    assert (config.policy.tau, config.policy.gamma, config.policy.max_answer_tokens) == (0.5, 0.33, 32)
    assert (config.learner.advantage, config.learner.schedule, config.learner.warmup_steps) == ("rloo", "cosine", 20)
    assert config.engine.count + config.learner.ranks == 8  # one node


def test_the_papers_45_runs_have_45_folders() -> None:
    runs = {
        load_config(FOLDER / "paper" / f"{name}.yaml", [f"policy.mode={mode}", f"run.seed={seed}"]).run.name
        for name in PAPER
        for mode in Mode
        for seed in range(3)
    }
    assert len(runs) == 45


def test_the_demo_uses_the_papers_prompt() -> None:
    assert load_config(FOLDER / "demo.yaml").task.prompt == "paper"
