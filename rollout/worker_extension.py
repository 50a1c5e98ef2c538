"""What softrl adds to every vLLM worker process, through vLLM's own `worker_extension_cls` and `collective_rpc`."""

import json
from collections.abc import Callable
from typing import Any

import torch
import vllm
from transformers import AutoTokenizer

from configs.errors import InputError
from rollout.adapters import attach, require_compatible
from rollout.checksums import readable_tensors, tensor_checksum
from rollout.models import PROBED_IDS
from rollout.plugin import plugin_ran
from rollout.soft_decoding import SoftDecoder
from rollout.step_profile import StepProfile
from rollout.token_tables import build_token_tables, silent_id
from rollout.vocab_rows import VocabRows, vocab_rows
from rollout.wire import AttachSpec, pack_records


class SoftWorkerExtension:
    """Methods that the engine actor calls on each worker. Nothing soft happens before `softrl_attach`."""

    model_runner: Any
    rank: int  # of this worker in its engine
    _weight_update_active: bool  # vLLM's own (vllm/v1/worker/gpu_worker.py): no update_weights has failed since its start
    finish_weight_update: Callable[[], None]
    softrl_step_profile: StepProfile

    def softrl_attach(self, spec_json: str) -> str:
        """Install the soft decoder in this worker's model runner; returns a JSON report of what is now running.

        For a model, tokenizer, runner or option of vLLM it cannot decode with: {"error": the reason}, because vLLM's RPC loses the
        type of an exception.
        """
        try:
            return json.dumps(attach_decoder(self.model_runner, AttachSpec.from_json(spec_json)))
        except InputError as error:
            return json.dumps({"error": str(error)})

    def softrl_take(self, record_ids: list[str]) -> bytes:
        """Finished records as one safetensors blob (rollout.wire); each is handed out once, by rank 0, and forgotten by all."""
        records = self.model_runner.softrl.take(record_ids)
        return pack_records(records) if self.rank == 0 else b""

    @torch.inference_mode()  # as vLLM's steps are, which make the tensors that are written here
    def softrl_refresh(self) -> None:
        """Look the weights up again after a push, which may have moved them; inputs that wait are made of the new ones."""
        model, requests = self.model_runner.get_model(), self.model_runner.softrl
        decoder = requests.decoder
        decoder.use_weights(input_embedding(model), output_head(model))
        for slot in requests.slots.values():
            if decoder.overlaid[slot]:
                newest = int(decoder.cot_length[slot]) - 1
                decoder.next_input[slot] = decoder.replay(slot, newest, newest + 1)[1][0]

    def softrl_checksums(self, shapes: dict[str, list[int]]) -> dict[str, str]:
        """Checksums of the tensors of a checkpoint, of these names and shapes, that this worker holds as they came."""
        return {name: tensor_checksum(tensor) for name, tensor in readable_tensors(self.model_runner.get_model(), shapes)}

    def softrl_abandon_update(self) -> None:
        """Make the model whole if a weight update is still open here: weights that came stay, all others are the old ones."""
        if self._weight_update_active:
            self.finish_weight_update()

    def softrl_profile(self, on: bool) -> str:
        """Begin to time the steps of this worker, or end it: then JSON, see StepProfile.stop."""
        if on:
            self.softrl_step_profile = StepProfile(self.model_runner)
            return "{}"
        return json.dumps(self.softrl_step_profile.stop())

    def softrl_stats(self) -> str:
        """What is held now, as JSON: slots, which vLLM frees with its next batch, and records that nobody has taken."""
        requests = self.model_runner.softrl
        slots_used = len(requests.decoder.phase) - requests.decoder.free_slots
        return json.dumps({"slots_used": slots_used, "records_untaken": len(requests.finished)})


def attach_decoder(runner: Any, spec: AttachSpec) -> dict[str, Any]:
    """Turn a worker's live model runner into a soft-decoding one; returns a report of what is now running.

    Raises InputError for a model, tokenizer, runner or option of vLLM that it cannot decode with.
    """
    require_compatible(runner.vllm_config)
    model = runner.get_model()
    embedding, head = input_embedding(model), output_head(model)
    vocab_size = runner.model_config.get_vocab_size()
    require_plain_inputs(model, embedding, vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(spec.tokenizer)
    decoder = SoftDecoder(
        slots=2 * spec.max_num_seqs,  # preempted requests keep their slot while others run
        max_cot_tokens=spec.max_cot_tokens,
        max_answer_tokens=spec.max_answer_tokens,
        tables=build_token_tables(tokenizer, vocab_size, spec.stop_phrase, spec.eos_ids),
        prefills=spec.prefills,
        stop_id=spec.stop_id,
        embedding=embedding,
        head=head,
    )
    decoder.other_id = silent_id(tokenizer, spec.stop_id)
    return {
        "adapter": attach(runner, decoder),
        "runner": type(runner).__name__,
        "vllm": vllm.__version__,
        "plugin": plugin_ran(),
        "dtype": str(embedding.rows.dtype).removeprefix("torch."),
        "tied": embedding.rows.data_ptr() == head.rows.data_ptr(),
        "vocab_size": vocab_size,
        "rms_embedding": runner.softrl.rms_embedding,
        "threads": torch.get_num_threads(),
    }


def input_embedding(model: Any) -> VocabRows:
    """[V', n0], the rows that the mixture is made of. Raises InputError where the model has none that we can find."""
    for module in (getattr(model, "model", None), getattr(getattr(model, "language_model", None), "model", None), model):
        embed = getattr(module, "embed_tokens", None)
        if embed is not None:
            return vocab_rows(embed)
    raise InputError(f"{type(model).__name__} is not supported: vLLM's class has no input embedding at model.embed_tokens")


def require_plain_inputs(model: Any, embedding: VocabRows, vocab_size: int) -> None:
    """Raises InputError unless the model's input for a token is the very mixture of that token alone, to the bit.

    A model that scales its embeddings would be fed mixtures of another scale than its tokens.
    """
    ids = torch.arange(0, vocab_size, max(1, vocab_size // PROBED_IDS), device=embedding.rows.device)
    inputs = model.embed_input_ids(ids)
    probs, offsets = torch.ones(len(ids), device=ids.device), torch.arange(len(ids) + 1, device=ids.device)
    mixtures = embedding.soft_embeddings(ids.int(), probs, offsets, torch.zeros_like(probs), ids, ids)
    if not torch.equal(inputs, mixtures):
        raise InputError(
            f"{type(model).__name__} is not supported: its inputs are not the rows of its embedding (it scales or shifts them), of "
            "which soft tokens are mixtures"
        )


def output_head(model: Any) -> VocabRows:
    """[V', d], the rows of the LM head, tied or not. Raises InputError where the model has none that we can find, and where its
    logits are not hidden @ head^T, which is what a worker rescores and the learner evaluates."""
    for module in (model, getattr(model, "language_model", None)):
        head = getattr(module, "lm_head", None)
        if head is not None and getattr(head, "weight", None) is not None:
            _require_plain_logits(type(model).__name__, head, getattr(module, "logits_processor", None))
            return vocab_rows(head)
    raise InputError(f"{type(model).__name__} is not supported: vLLM's class has no LM head at lm_head")


def _require_plain_logits(name: str, head: Any, processor: Any) -> None:
    """`processor` is vLLM's LogitsProcessor (vllm/model_executor/layers/logits_processor.py)."""
    for what, found, plain in (
        ("a bias in its LM head", getattr(head, "bias", None) is not None, False),
        (f"logits scaled by {processor.scale}", processor.scale, 1.0),
        (f"logits capped at {processor.soft_cap}", processor.soft_cap, None),
    ):
        if found != plain:
            raise InputError(f"{name} is not supported: it has {what}, soft decoding needs plain hidden @ head^T")
