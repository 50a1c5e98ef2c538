"""Every key of a softrl run: its type, its default, its meaning.

A field is documented where it is declared, has one default and is read in one place. Nothing here imports torch, vllm or ray,
so a config is checked in milliseconds on a login node. `configs.load` reads YAML into these classes and checks values;
the key `async` of the YAML is the field `async_` here, because Python keeps the word for itself.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Mode(StrEnum):
    """What the next input is while the model thinks (paper, section 3)."""

    hard = "hard"
    soft = "soft"
    fuzzy = "fuzzy"


class Support(StrEnum):
    """Over which tokens the learner evaluates the policy of a soft step."""

    recorded = "recorded"
    full = "full"


class Record(StrEnum):
    """How much of a soft step travels from engine to learner."""

    compact = "compact"
    full = "full"


class Dtype(StrEnum):
    """What a model is held, or computed, in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Schedule(StrEnum):
    """The learning rate after the warm-up (learner/optimiser.py)."""

    cosine = "cosine"
    constant = "constant"


class Advantage(StrEnum):
    """What a sample's reward is compared with (learner/advantage.py)."""

    rloo = "rloo"
    grpo = "grpo"


class PushBackend(StrEnum):
    """How weights travel from the learner to the engines."""

    auto = "auto"
    shm = "shm"
    nccl = "nccl"
    ipc = "ipc"

    def resolved(self, on_gpu: bool) -> "PushBackend":
        """What `auto` stands for in a process with or without a GPU; any other is itself."""
        if self is not PushBackend.auto:
            return self
        return PushBackend.nccl if on_gpu else PushBackend.shm


class InFlight(StrEnum):
    """What a push does to requests that are being decoded (rollout/engine.py)."""

    wait = "wait"  # lets them finish first
    keep = "keep"  # they go on with the KV of the old weights
    recompute = "recompute"  # they go on with KV of the new weights, from prompt, recorded mixtures and noise


@dataclass
class RunConfig:
    """Which run this is, and how long."""

    name: str = "run"  # the run's folder is dir/name
    dir: str = "runs"
    seed: int = 0  # noise, data order and sampling all derive from it
    steps: int = 4000  # optimiser steps


@dataclass
class ModelConfig:
    """The weights that training starts from."""

    path: str = "smollm2-135m"  # the embedded default, a Hugging Face id, or a local checkpoint folder
    dtype: Dtype = Dtype.bfloat16  # what `engine.dtype` and `learner.dtype` are unless set; what `softrl export` writes


@dataclass
class TaskConfig:
    """A data set is a built-in name, `NAME?key=value&...` for a generator, or {path, question, answer} for a file or hub id."""

    train: Any = "gsm8k"
    validation: Any = "gsm8k:validation"
    test: Any = "gsm8k:test"
    prompt: str = "paper"  # "paper", or a template that contains {question}


@dataclass
class PolicyConfig:
    """How a sample is drawn, and so what its probability is."""

    mode: Mode = Mode.soft
    tau: float | None = None  # CoT temperature; unset: the paper's own for the mode (hard 1, soft 0.5, fuzzy 0.0001)
    gamma: float = 0.33  # sigma = gamma * RMS(E), per coordinate; hard mode has no noise
    support: Support = Support.recorded  # evaluate the policy on the recorded support, or on the whole vocabulary (dense)
    record: Record = Record.compact  # `full` also ships the soft embeddings themselves
    max_cot_tokens: int = 128  # L
    max_answer_tokens: int = 32


@dataclass
class RolloutConfig:
    """The batch of one optimiser step."""

    prompts_per_step: int = 2  # B
    samples_per_prompt: int = 32  # G
    answer_temperature: float = 1.0


@dataclass
class EngineConfig:
    """The vLLM engines: how many, how large, how long they may take."""

    count: int = 1
    tensor_parallel: int = 1  # GPUs of one engine, all of one node; without GPUs, ranks of at least a core each
    dtype: Dtype = "${model.dtype}"  # type: ignore[assignment]
    max_num_seqs: int = 256  # requests decoded at once by one engine
    max_num_batched_tokens: int | None = None  # of one step, prompts included, longer ones in parts; unset: vLLM's own choice
    max_model_len: int = 2048  # prompt + CoT + prefill + answer, in tokens
    kv_cache_gib: float | None = None  # of each rank; unset: 2 on a CPU, vLLM's own share of the memory on a GPU
    enforce_eager: bool = False  # no torch.compile, no CUDA graphs (a CPU engine is always eager)
    threads: int | None = None  # CPU threads of one engine; unset: computed from the cores at hand
    start_timeout_s: float = 900.0
    request_timeout_s: float = 1800.0


@dataclass
class LearnerConfig:
    """The FSDP2 ranks: loss, optimiser, and how their work is cut up."""

    ranks: int = 1
    dtype: Dtype = "${model.dtype}"  # type: ignore[assignment]  # compute; masters and gradients are always float32
    lr: float = 6e-6
    warmup_steps: int = 20
    schedule: Schedule = Schedule.cosine  # from warm-up's end to zero at run.steps
    clip: float = 1.0  # gradient norm
    weight_decay: float = 0.0
    advantage: Advantage = Advantage.rloo
    cot_weight: float = 1.0  # factor on the CoT term of the loss; 0 learns from the answer alone
    micro_batch_tokens: int | None = 16384  # rows of one forward and backward, prompts once; null: what fits the GPU, to 16384
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of the decoder layers: a minute or two at the start; worth measuring on a GPU
    threads: int | None = None  # CPU threads of one rank; unset: computed from the cores at hand
    step_timeout_s: float = 3600.0


@dataclass
class PushConfig:
    """New weights on their way to the engines, and the proof that they arrived."""

    backend: PushBackend = PushBackend.auto  # auto: nccl with GPUs, shared memory without
    in_flight: InFlight = InFlight.wait  # wait, keep or recompute: what becomes of requests that are being decoded
    verify_every: int = 50  # steps between checks of the engine's weights; the first push is always checked
    timeout_s: float = 600.0


@dataclass
class AsyncConfig:
    """How far rollouts may run ahead of learning."""

    max_staleness: int = 0  # steps a batch may lag behind the weights; 0 is strictly on-policy


@dataclass
class CheckpointConfig:
    """When a run is saved, and how many of its checkpoints stay."""

    every: int = 50  # steps; the last step is always saved
    keep: int = 3


@dataclass
class EvalConfig:
    """Accuracy on held-out problems, as the run goes."""

    every: int = 50  # steps between validations; 0: only before the first and after the last step
    settings: list[str] = field(default_factory=lambda: ["hard_greedy"])  # the first greedy one chooses the best checkpoint
    samples: int = 1  # per problem; greedy settings always take 1
    problems: int = 256  # of the validation set and, during training, of the test set, the first ones
    max_cot_tokens: int | None = None  # L of an evaluation (the paper's: 512); unset: policy.max_cot_tokens


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    push: PushConfig = field(default_factory=PushConfig)
    async_: AsyncConfig = field(default_factory=AsyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def eval_cot_tokens(self) -> int:
        """L of an evaluation."""
        return self.eval.max_cot_tokens or self.policy.max_cot_tokens

    @property
    def selecting_setting(self) -> str | None:
        """The first greedy one of `eval.settings`, whose validation chooses the best checkpoint; None without any."""
        return next((setting for setting in self.eval.settings if setting.endswith("greedy")), None)


TAU_OF_MODE = {Mode.hard: 1.0, Mode.soft: 0.5, Mode.fuzzy: 1e-4}  # paper, section 4.1

EVAL_SETTINGS: dict[str, tuple[Mode, float, bool]] = {
    # name: (mode, tau, noise). Greedy hard decoding is tau 0; greedy soft and fuzzy drop the noise (paper, section 4.2).
    "hard_greedy": (Mode.hard, 0.0, False),
    "hard_sample": (Mode.hard, 1.0, False),
    "soft_greedy": (Mode.soft, 0.5, False),
    "soft_sample": (Mode.soft, 0.5, True),
    "fuzzy_greedy": (Mode.fuzzy, 1e-4, False),
    "fuzzy_sample": (Mode.fuzzy, 1e-4, True),
}
