"""The tensors of a checkpoint are found in a model that stacks, pads, packs and splits them as vLLM's do."""

import torch
from torch import nn

from rollout.checksums import readable_tensors, tensor_checksum

SHAPES = {
    "model.embed_tokens.weight": [5, 4],
    "model.layers.0.self_attn.q_proj.weight": [4, 4],
    "model.layers.0.self_attn.k_proj.weight": [2, 4],
    "model.layers.0.self_attn.v_proj.weight": [2, 4],
    "model.layers.0.mlp.gate_proj.weight": [6, 4],
    "model.layers.0.mlp.up_proj.weight": [6, 4],
    "model.layers.0.mlp.down_proj.weight": [4, 6],
    "model.norm.weight": [4],
}


class Stacked(nn.Module):
    """vLLM's Llama, as far as its parameters go."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self, **shapes: list[int]) -> None:
        super().__init__()
        found = {
            "model.embed_tokens.weight": [8, 4],
            "model.layers.0.self_attn.qkv_proj.weight": [8, 4],
            "model.layers.0.mlp.gate_up_proj.weight": [12, 4],
            "model.layers.0.mlp.down_proj.weight": [4, 6],
            "model.norm.weight": [4],
        } | {name.replace("__", "."): shape for name, shape in shapes.items()}
        self.held = {
            name: nn.Parameter(torch.arange(torch.Size(shape).numel()).float().view(shape)) for name, shape in found.items()
        }

    def named_parameters(self, *_: object, **__: object):  # type: ignore[no-untyped-def]
        return iter(self.held.items())


def test_each_tensor_is_its_part_of_a_stack() -> None:
    model = Stacked()
    found = dict(readable_tensors(model, SHAPES))
    assert found.keys() == SHAPES.keys() and all(list(found[name].shape) == shape for name, shape in SHAPES.items())
    qkv, gate_up = model.held["model.layers.0.self_attn.qkv_proj.weight"], model.held["model.layers.0.mlp.gate_up_proj.weight"]
    parts = [found[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), qkv)
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], gate_up[6:])
    assert torch.equal(found["model.embed_tokens.weight"], model.held["model.embed_tokens.weight"][:5])


def test_what_is_packed_or_split_is_not_read() -> None:
    halves = {  # of two ranks; the norm is on both
        "model__embed_tokens__weight": [3, 4],
        "model__layers__0__self_attn__qkv_proj__weight": [4, 4],
        "model__layers__0__mlp__gate_up_proj__weight": [6, 4],
        "model__layers__0__mlp__down_proj__weight": [4, 3],
    }
    assert [name for name, _ in readable_tensors(Stacked(**halves), SHAPES)] == ["model.norm.weight"]
    packed = Stacked(model__layers__0__mlp__down_proj__weight=[0])
    assert "model.layers.0.mlp.down_proj.weight" not in dict(readable_tensors(packed, SHAPES))


def test_one_bit_changes_a_checksum_and_the_shape_of_equal_bytes_does_not() -> None:
    tensor = torch.randn(3, 4)
    other = tensor.view(torch.int32).bitwise_xor(torch.eye(3, 4, dtype=torch.int32)).view(torch.float32)
    assert tensor_checksum(tensor) != tensor_checksum(other)
    assert tensor_checksum(tensor) == tensor_checksum(tensor.reshape(12))
