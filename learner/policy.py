"""A Hugging Face causal LM as the policy, sharded by FSDP2: float32 masters, compute in `learner.dtype`.

    PackedBatch -> embed tokens -> overlay h~ at soft rows -> decoder layers -> hidden rows -> log pi -> weighted loss

Everything happens inside one `forward`, because embedding, final norm and LM head belong to the FSDP root unit: they are
unsharded once per forward and backward, and a tied embedding, used at both ends, gets its gradient reduced once.
"""

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from configs.errors import InputError
from configs.schema import Config, Dtype
from kernels.soft_embedding import rebuild, rms
from kernels.token_logprob import token_logprob
from learner import attention
from learner.attention import Segments
from learner.batch import PackedBatch, SoftSteps
from learner.losses import Terms, policy_terms
from rollout.models import LOGIT_KEYS, PROBED_IDS

TORCH_DTYPE = {Dtype.bfloat16: torch.bfloat16, Dtype.float32: torch.float32}


class Policy(nn.Module):
    """pi_theta over packed trajectories. `model` is the Hugging Face model: its parameter names are the checkpoint's."""

    def __init__(self, model: nn.Module, config: Config, rms_embedding: float) -> None:
        super().__init__()
        self.model = model
        self.rms_embedding = rms_embedding  # over all entries of the loaded E
        self.support = config.policy.support
        self.cot_weight = config.learner.cot_weight
        self.engine_dtype = TORCH_DTYPE[config.engine.dtype]

    @property
    def embedding(self) -> Tensor:
        """E [V, n0], trainable: all of it in the root unit's dtype inside `forward`, float32 shards (a DTensor) at rest."""
        return cast(Any, self.model).get_input_embeddings().weight

    @property
    def head(self) -> Tensor:
        """[V, d], of which logits are hidden @ head^T; sharded as `embedding` is."""
        return cast(Any, self.model).get_output_embeddings().weight

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one parameter, whose gradient comes from both its uses."""
        return self.embedding is self.head

    def forward(self, batch: PackedBatch) -> Terms:
        """Loss and per-step quantities of one micro-batch that lies on the policy's device."""
        embedding = self.embedding
        noisy = self._noisy(batch.soft, embedding.detach())
        inputs = nn.functional.embedding(batch.input_ids, embedding)
        inputs = inputs.index_copy(0, batch.soft.input_row, noisy.to(inputs.dtype))
        hidden = self._body(inputs, batch.position, batch.segments)
        return policy_terms(
            hidden,
            self.head,
            embedding,
            noisy,
            batch,
            support=self.support,
            engine_dtype=self.engine_dtype,
            cot_weight=self.cot_weight,
        )

    def next_token_logprobs(self, ids: Tensor) -> Tensor:
        """log p(ids[i+1] | ids[:i+1]) at temperature 1: ids int64 [T] -> float32 [T-1]. No gradient."""
        inputs = nn.functional.embedding(ids, self.embedding)
        hidden = self._body(inputs, torch.arange(len(ids), device=ids.device), None)
        return token_logprob(hidden[:-1], self.head, ids[1:])[0]

    def _body(self, inputs: Tensor, position: Tensor, segments: Segments | None) -> Tensor:
        """Hidden states [R, d] after the final norm; inputs [R, n0], position [R]; segments of None is one causal sequence."""
        body = cast(Any, self.model).base_model
        packed: dict[str, Any] = {}
        if segments is not None:  # no mask is built for a mask that is there; this one of no keys only says that there are segments
            mask = torch.empty(1, 1, len(inputs), 0, dtype=torch.bool, device=inputs.device)
            packed = {"attention_mask": mask, "segments": segments}
        output = body(inputs_embeds=inputs[None], position_ids=position[None], use_cache=False, **packed)
        return output.last_hidden_state[0]

    @torch.no_grad()
    def _noisy(self, steps: SoftSteps, embedding: Tensor) -> Tensor:
        """h~ of every soft step, [S, n0] in the engine's dtype: as recorded, or rebuilt bit for bit from support and seed."""
        if steps.recorded is not None:
            return steps.recorded.view(self.engine_dtype)
        if len(steps.sigma) == 0:
            return embedding.new_zeros((0, embedding.shape[1]), dtype=self.engine_dtype)
        ids, probs, offsets = steps.support_ids, steps.support_probs, steps.support_offsets
        return rebuild(ids, probs, offsets, embedding, steps.sigma, steps.seed, steps.position, self.engine_dtype)


def build_policy(model_dir: str | Path, config: Config, device: torch.device) -> Policy:
    """Loads a checkpoint folder and shards it over the ranks of the default process group.

    Raises InputError for a folder that does not load and for a model whose policy we could not state exactly.
    """
    # The checkpoint's own dtype on the host, float32 layer by layer as it is sharded: eight ranks of an 8B model fit one node.
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype="auto", attn_implementation=attention.NAME, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{model_dir}: transformers cannot load a causal LM from here ({reason}); check model.path") from error
    if absent := sorted(loading["missing_keys"]):
        raise InputError(f"{model_dir}: lacks {', '.join(absent[:3])} ({len(absent)} tensors); expected a whole causal LM")
    layers = _require_supported(model, model_dir)
    require_plain_inputs(model, layers[0], model_dir)
    _without_dropout(model)
    if config.learner.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # transformers checkpoints activations only in training mode
    policy = Policy(model, config, rms(model.get_input_embeddings().weight.detach()))
    _shard(policy, layers, config, device)
    if config.learner.compile:
        for layer in layers:  # one graph for all of them, and for every number of rows; FSDP's hooks stay outside
            layer.forward = torch.compile(layer.forward, dynamic=True)
    return policy


def _require_supported(model: Any, model_dir: str | Path) -> nn.ModuleList:
    """The decoder layers of a model whose logits are head @ last_hidden_state under full causal attention; else InputError."""
    config = model.config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        missing = "input embedding" if embedding is None else "output head"
        raise InputError(f"{model_dir}: no {missing} found in {type(model).__name__}; softrl needs a causal LM that has both")
    if getattr(head, "bias", None) is not None:
        raise InputError(f"{model_dir}: the LM head has a bias; softrl evaluates logits as hidden @ head^T")
    for key in LOGIT_KEYS:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise InputError(f"{model_dir}: {key} {getattr(config, key)} changes the logits; softrl evaluates hidden @ head^T")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise InputError(f"{model_dir}: sliding or other partial attention ({', '.join(sorted(kinds))}) cannot be packed")
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise InputError(f"{model_dir}: no list of {config.num_hidden_layers} decoder layers found in {type(model).__name__}")


class _Reached(Exception):
    """The first decoder layer was reached; holds its input."""


@torch.no_grad()
def require_plain_inputs(model: Any, first_layer: nn.Module, model_dir: str | Path) -> None:
    """Raises InputError unless token ids and the embedding's rows of them reach the first decoder layer alike, to the bit.

    A model may scale embeddings in the embedding's own module (Gemma) or in its body, there for ids alone (Falcon-H1) or for
    both (Granite, which is no matter: soft rows are scaled with the others).
    """

    def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    def reached(**inputs: Tensor) -> Tensor:
        try:
            model.base_model(position_ids=position, use_cache=False, **inputs)
        except _Reached as found:
            return cast(Tensor, found.args[0])
        raise InputError(f"{model_dir}: {type(model).__name__} does not run the decoder layers that it lists")

    rows = model.get_input_embeddings().weight
    ids = torch.arange(0, len(rows), max(1, len(rows) // PROBED_IDS))[None]
    position = torch.arange(ids.shape[1])[None]
    hook = first_layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        plain = torch.equal(reached(input_ids=ids), reached(inputs_embeds=rows[ids]))
    finally:
        hook.remove()
    if not plain:
        raise InputError(
            f"{model_dir}: {type(model).__name__} scales or shifts the rows of its embedding on their way in; soft tokens are "
            "mixtures of the rows as they are"
        )


def _without_dropout(model: nn.Module) -> None:
    """The policy that learns must be the one that acted, and the engine has no dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _shard(policy: Policy, layers: nn.ModuleList, config: Config, device: torch.device) -> None:
    """fully_shard on every decoder layer, then on the root. Gradients are summed over ranks: the loss holds 1 / (B G)."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    compute = TORCH_DTYPE[config.learner.dtype]
    # The engine mixes rows of E in its own dtype. A bf16 learner beside a float32 engine keeps its root unit (E and head) in
    # float32, or it would rebuild h~ from rounded rows.
    root = torch.promote_types(compute, TORCH_DTYPE[config.engine.dtype])
    tied = policy.tied
    for layer in layers:
        layer.to(device=device, dtype=torch.float32)
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32))
    for parameter in policy.parameters():
        if not isinstance(parameter, DTensor):  # .data keeps tied parameters one
            parameter.data = parameter.data.to(device=device, dtype=torch.float32)
    # cast_forward_inputs would reach into the PackedBatch and round tau, sigma, probabilities and advantages to bf16.
    exact_inputs = MixedPrecisionPolicy(param_dtype=root, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(policy, mesh=mesh, mp_policy=exact_inputs)
    if policy.tied != tied:
        raise RuntimeError("sharding untied the embedding from the head")
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no premultiplied sum
            module.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(policy, "next_token_logprobs")
