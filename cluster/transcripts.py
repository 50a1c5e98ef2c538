"""Whole trajectories of an evaluation's first problems, which is what `softrl show` shows.

    runs/NAME/rollouts/test_000040_gsm8k_test.safetensors, .json    for each of KEPT_PROBLEMS a group: one sample of each setting

They are written as they finish, so an interrupted evaluation loses none.
"""

from pathlib import Path

from configs.load import config_hash
from configs.schema import Config
from rollout.evaluation import setting_of
from rollout.files import read_description, read_groups, write_rollouts
from rollout.trajectory import Group, Sample

FOLDER = "rollouts"
KEPT_PROBLEMS = 8  # with supports of some 40 tokens and 512 steps in four soft settings: 5 MB


class Transcripts:
    """The kept samples of one evaluation of one data set. One process at a time."""

    def __init__(self, config: Config, folder: Path, name: str, step: int, go_on: bool) -> None:
        """`folder` is runs/NAME/rollouts, made when something is kept; `go_on` keeps what an interrupted evaluation left there."""
        self.config, self.folder, self.name, self.step = config, folder, name, step
        self._kept: dict[tuple[int, str], Sample] = {}
        if go_on and (folder / f"{name}.safetensors").exists():
            self._kept = kept_samples(folder, name)

    def keep(self, setting: str, sample: Sample) -> None:
        """Write the sample at once if it is one to keep. Raises RunError when the folder cannot be written."""
        trajectory = sample.trajectory
        if trajectory.prompt_index >= KEPT_PROBLEMS or trajectory.sample_index > 0:
            return
        self._kept[trajectory.prompt_index, setting] = sample
        groups: dict[int, list[Sample]] = {}
        for (problem, _), one in sorted(self._kept.items(), key=lambda item: item[0]):
            groups.setdefault(problem, []).append(one)
        write_rollouts(
            self.folder,
            self.name,
            [Group(step=self.step, prompt_index=problem, samples=tuple(samples)) for problem, samples in groups.items()],
            model=self.config.model.path,
            weight_version=self.step,
            config_hash=config_hash(self.config),
            engine_dtype=self.config.engine.dtype,
        )


def kept_samples(folder: Path, name: str) -> dict[tuple[int, str], Sample]:
    """By (problem, setting). Raises InputError when folder/name is not there or cannot be read."""
    file = read_description(folder / f"{name}.safetensors")
    samples = [sample for group in read_groups(file) for sample in group.samples]
    return {(sample.trajectory.prompt_index, setting_of(sample.trajectory)): sample for sample in samples}
