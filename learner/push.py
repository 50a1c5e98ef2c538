"""Weight push, the learner's side: gather, cast, send, and prove that what arrived is what was sent.

    rank 0..n-1  gather each tensor in the same order (a collective)
    rank 0       start_weight_update -> send -> finish_weight_update(version)   through EngineClient, to all engines at once
    verify       checksums of the tensors that an engine can read, and its log-probs of fixed tokens, against the learner's

Both backends are vLLM weight-transfer engines: its own NCCL engine, or shared memory (the receiver is rollout.weight_transfer).
The version rises in `finish_weight_update` and nowhere else, so an engine never claims weights that it does not hold.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, TrainerWeightTransferEngine, WeightSource

from configs.errors import RunError
from configs.schema import Dtype, PushBackend
from learner.network import free_port
from rollout.checksums import tensor_checksum
from rollout.weight_transfer import SharedMemoryInitInfo, SharedMemoryUpdateInfo

SHARED_MEMORY = Path("/dev/shm")

# How far engine and learner log-probs of fixed tokens may lie apart after a push. float32: the largest difference. bfloat16: the
# mean, since two correct bf16 forward passes differ by a few hundredths of a nat on average.
TOLERANCE = {Dtype.float32: ("max", 1e-4), Dtype.bfloat16: ("mean", 0.1)}


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push cost, as its rank saw it."""

    seconds: float  # from the first gather to the last engine resumed
    pause_seconds: float  # engines paused; 0 on the ranks that do not talk to them
    bytes: int  # of the model in the engine's dtype, counted once however many engines there are


class EngineClient:
    """vLLM's weight-sync protocol over Ray actors of rollout.engine.RolloutEngine, with a name and a deadline on every wait."""

    def __init__(self, engines: list[Any], workers_per_engine: int, timeout_s: float) -> None:
        self.engines, self.workers_per_engine, self.timeout_s = engines, workers_per_engine, timeout_s
        self.version: str | None = None  # what the running push will be called
        self.paused_at = self.resumed_at = 0.0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Engines are independent vLLM instances: each takes the ranks after the ones before it."""
        infos = [dict(init_info) for _ in self.engines]
        for i, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] += i * self.workers_per_engine
        self._all("init_weight_transfer_engine", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        """Returns when every engine stands still, as push.in_flight says. Raises RunError when one fails or is late."""
        self._all("start_weight_update", [()] * len(self.engines))
        self.paused_at = time.perf_counter()

    def update_weights(self, update_info: Any) -> None:
        """Returns when every engine has loaded what `update_info` describes. Raises RunError when one fails or is late."""
        self._all("update_weights", [(update_info,)] * len(self.engines))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Engines resume, at the version of the running push unless told another. Raises RunError when one fails or is late."""
        self._all("finish_weight_update", [(weight_version or self.version,)] * len(self.engines))
        self.resumed_at = time.perf_counter()

    def abandon_weight_update(self) -> None:
        """After an update that failed on some engine: all go on with the weights they have, at the version of those."""
        self._all("abandon_weight_update", [(self.version,)] * len(self.engines))

    def token_logprobs(self, sequences: list[NDArray[np.int32]]) -> list[list[NDArray[np.float32]]]:
        """Per engine, the log-probs of each sequence."""
        return self._all("token_logprobs", [(sequences,)] * len(self.engines))

    def weight_checksums(self, shapes: dict[str, list[int]]) -> list[list[dict[str, str]]]:
        """Per engine and worker, the checksums of the tensors that it holds as they were sent."""
        return self._all("weight_checksums", [(shapes,)] * len(self.engines))

    def _all(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        refs = [getattr(engine, method).remote(*args) for engine, args in zip(self.engines, arguments, strict=True)]
        try:
            return ray.get(refs, timeout=self.timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"push: {method} on {len(refs)} engines took over push.timeout_s = {self.timeout_s}") from None
        except ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", error)).strip() or type(error).__name__
            raise RunError(f"push: {method} failed on an engine: {reason.splitlines()[0]}") from error


class LearnerSource(WeightSource):
    """The learner's parameters as a checkpoint would hold them, in the engine's dtype."""

    def __init__(self, metas: list[ParamMeta], tensors: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        self._metas, self._tensors = metas, tensors

    def metadata(self) -> list[ParamMeta]:
        """Name, engine's dtype and full shape of each tensor, in the order of iteration; nothing is gathered."""
        return self._metas

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._tensors()


@dataclass
class SharedMemoryTrainerInfo(TrainerInitInfo):
    """Where rank 0 writes the model: a file named after its process, which exists only until it is open."""

    backend: ClassVar[str] = "softrl_shm"
    path: str = str(SHARED_MEMORY / f"softrl-{os.getpid()}.safetensors")


class SharedMemoryTrainer(TrainerWeightTransferEngine[SharedMemoryTrainerInfo]):
    """The sender that belongs to rollout.weight_transfer.SharedMemoryWeightTransferEngine."""

    init_info_cls = SharedMemoryTrainerInfo
    path: Path

    @classmethod
    def trainer_init(cls, init_info: SharedMemoryTrainerInfo, *, client: Any, source: WeightSource | None = None) -> Self:
        """Called on every rank; rank 0 sends the engines their manifest. Raises RunError when one fails or is late."""
        trainer = cls(client=client, source=source, is_sender=init_info.is_sender)
        trainer.path = Path(init_info.path)
        if trainer.is_sender and source is not None:
            client.init_weight_transfer_engine(asdict(_manifest(source.metadata())))
        return trainer

    def send_weights(self) -> None:
        """Raises RunError when shared memory is full or an engine fails; an engine that refuses the push keeps its old weights, and
        all go on."""
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:  # joins the gathers, keeps nothing
                pass
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.source}
        try:
            save_file(tensors, self.path)
            file = os.open(self.path, os.O_RDONLY)
        except (OSError, SafetensorError) as error:
            raise RunError(f"push: cannot write {self.path} ({error}); free {SHARED_MEMORY} or make it larger") from error
        finally:  # engines read it through our descriptor, so a run that is killed leaves nothing in shared memory
            self.path.unlink(missing_ok=True)
        try:
            path = f"/proc/{os.getpid()}/fd/{file}"
            update = SharedMemoryUpdateInfo(path, {name: tensor_checksum(t) for name, t in tensors.items()})
            try:
                self.client.start_weight_update()
                self.client.update_weights(asdict(update))
                self.client.finish_weight_update()
            except RunError:
                with suppress(RunError):  # an engine that died cannot resume; the others can
                    self.client.abandon_weight_update()
                raise
        finally:
            os.close(file)


class Pusher:
    """One per learner rank. Every rank calls `push` and `verify`; only rank 0 talks to the engines."""

    def __init__(
        self,
        *,
        backend: PushBackend,
        rank: int,
        engines: list[Any],
        workers_per_engine: int,
        engine_dtype: Dtype,
        timeout_s: float,
        tensors: Callable[[torch.dtype], Iterator[tuple[str, Tensor]]],
        metas: list[tuple[str, torch.Size]],
    ) -> None:
        dtype = getattr(torch, engine_dtype)
        self.rank = rank
        self.client = EngineClient(engines, workers_per_engine, timeout_s)
        self.engine_dtype = engine_dtype
        self.bytes = sum(shape.numel() for _, shape in metas) * dtype.itemsize
        self.source = LearnerSource([ParamMeta(name, dtype, tuple(shape)) for name, shape in metas], lambda: tensors(dtype))
        self.trainer = _trainer(backend, rank, self.client, self.source)

    def push(self, version: int) -> PushReport:
        """Send the current weights as `version`. Raises RunError when it does not arrive whole or in time."""
        begun = time.perf_counter()
        self.client.version = str(version)
        self.trainer.send_weights()
        pause = self.client.resumed_at - self.client.paused_at if self.rank == 0 else 0.0
        return PushReport(time.perf_counter() - begun, pause, self.bytes)

    def verify(self, sequences: list[NDArray[np.int32]], mine: list[NDArray[np.float32]], version: int) -> float:
        """The distance between the engines' log-probs of fixed tokens and the learner's; 0 on the ranks that do not ask.

        Raises RunError beyond TOLERANCE, and for a tensor of which an engine holds other bytes than the learner.
        """
        self._compare_bytes(version)
        if self.rank != 0:
            return 0.0
        statistic, limit = TOLERANCE[self.engine_dtype]
        worst = 0.0
        for index, theirs in enumerate(self.client.token_logprobs(sequences)):
            gap = np.abs(np.concatenate(theirs) - np.concatenate(mine))
            distance = float(gap.max() if statistic == "max" else gap.mean())
            if not distance <= limit:
                raise RunError(
                    f"push: weight version {version} is wrong in engine {index}: {statistic} log-prob difference {distance:.2e} on "
                    f"fixed tokens, expected at most {limit:.0e}; the engine does not hold the learner's weights"
                )
            worst = max(worst, distance)
        return worst

    def _compare_bytes(self, version: int) -> None:
        """Every rank joins the gathers. Weights that an engine's kernels have packed, or its ranks have split, are not compared."""
        if self.rank != 0:
            for _ in self.source:
                pass
            return
        engines = self.client.weight_checksums({meta.name: list(meta.shape) for meta in self.source.metadata()})
        read = {name for workers in engines for held in workers for name in held}
        mine = {name: tensor_checksum(tensor) if name in read else "" for name, tensor in self.source}
        for index, workers in enumerate(engines):
            wrong = sorted({name for held in workers for name, checksum in held.items() if checksum != mine[name]})
            if wrong:
                raise RunError(
                    f"push: weight version {version} is wrong in engine {index}: {wrong[0]} is not the learner's "
                    f"({len(wrong)} of {len(read)} tensors that can be compared); the engine does not hold the learner's weights"
                )


def _trainer(backend: PushBackend, rank: int, client: EngineClient, source: LearnerSource) -> Any:
    if backend is PushBackend.shm:
        return SharedMemoryTrainer.trainer_init(SharedMemoryTrainerInfo(rank=rank), client=client, source=source)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    world_size = 1 + len(client.engines) * client.workers_per_engine
    info = NCCLTrainerInitInfo(
        rank=rank, master_address=ray.util.get_node_ip_address(), master_port=free_port(), world_size=world_size
    )
    return NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)


def _manifest(metas: list[ParamMeta]) -> SharedMemoryInitInfo:
    return SharedMemoryInitInfo(
        names=[m.name for m in metas],
        dtype_names=[str(m.dtype).removeprefix("torch.") for m in metas],
        shapes=[list(m.shape) for m in metas],
    )
