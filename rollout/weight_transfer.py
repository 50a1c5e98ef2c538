"""Weight push through shared memory: the receiving side, inside a vLLM worker.

The learner writes one safetensors file to a memory-backed folder; every worker on the node maps it and loads from it. What vLLM
calls a checkpoint-format engine (vllm/distributed/weight_transfer/nccl_engine.py is the model): the layerwise reload before and
after lets vLLM repack weights for its kernels, and a tensor that is missing, doubled or of another shape is refused by name.
"""

from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from rollout.checksums import tensor_checksum


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """The manifest every push must match: names, dtypes and shapes in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One push: the file that holds every tensor of the manifest, and what its bytes must be (rollout.checksums)."""

    path: str  # safetensors file in memory-backed storage
    checksums: dict[str, str]  # of each tensor, by name


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads a whole model from a file written by learner.push."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo
    manifest: SharedMemoryInitInfo | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Keep the manifest; there is no connection to open."""
        self.manifest = init_info

    def start_weight_update(self) -> None:
        """Set the weights aside until `finish_weight_update`; the model cannot run in between."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Check the whole file, then load it. Raises ValueError naming the tensor, or OSError or SafetensorError for a file
        that cannot be read, with the old weights back in place."""
        assert self.manifest is not None, "init_transfer_engine comes first"
        try:
            with safetensors.safe_open(update_info.path, framework="pt") as file:
                check_file(file, self.manifest, update_info.checksums)
        except (ValueError, OSError, safetensors.SafetensorError):
            self.finish_weight_update()  # nothing was loaded: puts every layer's own weights back
            raise
        with safetensors.safe_open(update_info.path, framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name).to(self.device)) for name in self.manifest.names)

    def finish_weight_update(self) -> None:
        """Make the model whole, in the memory that its weights had before: a layer that got nothing has its old ones back."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_heads(self.model)

    def shutdown(self) -> None:
        """Forget the manifest; no push can be received until the next `init_transfer_engine`."""
        self.manifest = None


def repack_heads(model: torch.nn.Module) -> None:
    """Make every LM head's packed copy of its weights anew.

    A tied head receives no tensor of its own, so vLLM's reload leaves it alone; but on a CPU it multiplies with a packed copy of
    the shared matrix (vllm/model_executor/layers/utils.py:dispatch_cpu_unquantized_gemm), which would stay the old one.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def check_file(file: Any, manifest: SharedMemoryInitInfo, checksums: dict[str, str]) -> None:
    """Raises ValueError when the file's tensors are not exactly the manifest's, or not the bytes that the learner sent."""
    sent, expected = set(file.keys()), set(manifest.names)
    if sent != expected:
        missing, extra = sorted(expected - sent)[:3], sorted(sent - expected)[:3]
        raise ValueError(f"weight push refused: missing tensors {missing}, unexpected tensors {extra}")
    for name, dtype, shape in zip(manifest.names, manifest.dtype_names, manifest.shapes, strict=True):
        tensor = file.get_tensor(name)
        if list(tensor.shape) != list(shape) or str(tensor.dtype) != f"torch.{dtype}":
            raise ValueError(f"weight push refused: {name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
        if tensor_checksum(tensor) != checksums.get(name):
            raise ValueError(f"weight push refused: the bytes of {name} are not those the learner sent")
