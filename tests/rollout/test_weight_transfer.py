"""A pushed file is loaded whole, or refused by the name of its first wrong tensor before any weight is touched."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from rollout.checksums import tensor_checksum
from rollout.plugin import SHM_BACKEND
from rollout.weight_transfer import SharedMemoryWeightTransferEngine


class Model(nn.Module):
    """Loads weights as vLLM's models do: by name, each through the loader that vLLM has put on the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, dtype=torch.bfloat16)
        self.up, self.down = nn.Linear(4, 3), nn.Linear(4, 3)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.named_parameters())
        for name, tensor in weights:
            getattr(own[name], "weight_loader", default_weight_loader)(own[name], tensor)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Push:
    """An engine that knows its manifest, and a good push for it, to be spoiled."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model, self.sent, self.path = Model(), weights_of(Model()), folder / "weights.safetensors"
        record_metadata_for_reloading(self.model)  # as vLLM does when it has built a model
        self.checksums = {name: tensor_checksum(tensor) for name, tensor in self.sent.items()}
        configs = SimpleNamespace(parallel_config=None, model_config=None)  # what the base class keeps of vLLM's config
        config = WeightTransferConfig(backend=SHM_BACKEND)
        self.engine = SharedMemoryWeightTransferEngine(config, configs, torch.device("cpu"), self.model)
        manifest = {
            "names": list(self.sent),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in self.sent.values()],
            "shapes": [list(tensor.shape) for tensor in self.sent.values()],
        }
        self.engine.init_transfer_engine(self.engine.parse_init_info(manifest))

    def write(self) -> None:
        save_file(self.sent, self.path)

    def receive(self) -> None:
        """As a vLLM worker does; a refusal ends the update there."""
        self.engine.start_weight_update()
        self.engine.receive_weights(self.engine.parse_update_info({"path": str(self.path), "checksums": self.checksums}))
        self.engine.finish_weight_update()


@pytest.fixture
def push(tmp_path: Path) -> Push:
    return Push(tmp_path)


def test_a_good_push_is_loaded_into_the_same_memory(push: Push) -> None:
    places = {name: weight.data_ptr() for name, weight in push.model.named_parameters()}
    assert not same(weights_of(push.model), push.sent)
    push.write()
    push.receive()
    assert same(weights_of(push.model), push.sent)
    assert {name: weight.data_ptr() for name, weight in push.model.named_parameters()} == places


def missing(push: Push) -> None:
    del push.sent["up.bias"]


def extra(push: Push) -> None:
    push.sent["lm_head.weight"] = torch.zeros(2)


def renamed(push: Push) -> None:
    push.sent["module.up.bias"] = push.sent.pop("up.bias")


def transposed(push: Push) -> None:
    push.sent["up.weight"] = push.sent["up.weight"].T.contiguous()


def retyped(push: Push) -> None:
    push.sent["embed.weight"] = push.sent["embed.weight"].float()


def reinterpreted(push: Push) -> None:
    """The very same bytes under another type."""
    push.sent["embed.weight"] = push.sent["embed.weight"].view(torch.float16)


def swapped(push: Push) -> None:
    """Two tensors of one shape and type: nothing but the checksums can tell."""
    push.sent["up.weight"], push.sent["down.weight"] = push.sent["down.weight"], push.sent["up.weight"]


def one_bit_off(push: Push) -> None:
    push.sent["down.bias"].view(torch.int32)[1] ^= 1


def one_checksum_missing(push: Push) -> None:
    del push.checksums["down.bias"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, r"missing tensors \['up.bias'\], unexpected tensors \[\]"),
        (extra, r"missing tensors \[\], unexpected tensors \['lm_head.weight'\]"),
        (renamed, r"missing tensors \['up.bias'\], unexpected tensors \['module.up.bias'\]"),
        (transposed, r"up.weight is torch.float32 \[4, 3\], expected float32 \[3, 4\]"),
        (retyped, r"embed.weight is torch.float32 \[6, 4\], expected bfloat16 \[6, 4\]"),
        (reinterpreted, r"embed.weight is torch.float16 \[6, 4\], expected bfloat16 \[6, 4\]"),
        (swapped, "the bytes of (up|down).weight are not those the learner sent"),
        (one_bit_off, "the bytes of down.bias are not those the learner sent"),
        (one_checksum_missing, "the bytes of down.bias are not those the learner sent"),
    ],
)
def test_a_bad_push_is_refused_by_name_and_the_old_weights_stay(push: Push, spoil: Callable[[Push], None], message: str) -> None:
    old, good = weights_of(push.model), {name: tensor.clone() for name, tensor in push.sent.items()}
    good_checksums = dict(push.checksums)
    spoil(push)
    push.write()
    with pytest.raises(ValueError, match=f"weight push refused: {message}"):
        push.receive()
    assert same(weights_of(push.model), old)
    push.sent, push.checksums = good, good_checksums
    push.write()
    push.receive()  # the next push is as if nothing had been
    assert same(weights_of(push.model), good)


@pytest.mark.parametrize("length", [None, 0, 100, -1])
def test_a_file_that_is_gone_or_cut_short_leaves_the_old_weights(push: Push, length: int | None) -> None:
    old = weights_of(push.model)
    push.write()
    content = push.path.read_bytes()
    push.path.unlink()
    if length is not None:
        push.path.write_bytes(content[:length])
    with pytest.raises((OSError, SafetensorError)):
        push.receive()
    assert same(weights_of(push.model), old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 6)])
def test_a_checksum_is_of_bytes_and_length(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    assert tensor_checksum(tensor) == tensor_checksum(tensor.clone())
    assert tensor_checksum(tensor).endswith(f"-{tensor.numel() * tensor.element_size()}")
    if tensor.ndim == 2 and tensor.numel():
        strided = tensor.T.contiguous().T
        assert not strided.is_contiguous() and tensor_checksum(strided) == tensor_checksum(tensor)
        assert tensor_checksum(tensor[torch.tensor([1, 0, 2, 3])]) != tensor_checksum(tensor)
        assert tensor_checksum(tensor[:2]) != tensor_checksum(tensor)
