"""Stories told to a decoder, one after the other or in a crowd that changes all the time."""

from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from rollout.record import SlotRecord
from rollout.soft_decoding import DONE, SoftDecoder
from tests.rollout.slow_decoding import Story, Toy


@dataclass
class Seen:
    """What a decoder did for one story."""

    emitted: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)  # [n0] what the model is fed after each position but the last
    phases: list[int] = field(default_factory=list)
    record: SlotRecord | None = None


def decode(toy: Toy, decoder: SoftDecoder, stories: list[Story], random: Random | None = None) -> list[Seen]:
    """Run stories through a decoder: one after the other, or, with `random`, many at a time, in batches that change all the time:
    rows come and go, change places, miss steps and are asked again for outputs that were discarded, as under preemption. Replays
    whatever has been fed so far."""
    seen, waiting, running = [Seen() for _ in stories], list(range(len(stories))), dict[int, int]()
    while waiting or running:
        while waiting and decoder.free_slots and (not running or (random and random.random() < 0.5)):
            story = waiting.pop(0)
            running[story] = decoder.admit(stories[story].request)
        batch = list(running)
        if random:
            batch = random.sample(batch, random.randint(1, len(batch)))
        slots = torch.tensor([running[story] for story in batch], device=decoder.device)
        hidden = torch.stack([stories[story].hidden[len(seen[story].phases)] for story in batch])
        logits = torch.stack([stories[story].logits(toy, len(seen[story].phases)) for story in batch])
        output_index = [known_outputs(seen[story], random) for story in batch]
        rows = (part.to(decoder.device) for part in (torch.tensor(output_index), logits, hidden))
        emitted = decoder.advance(slots, *rows).tolist()
        for story, slot, index, token in zip(batch, slots.tolist(), output_index, emitted, strict=True):
            one = seen[story]
            if index < len(one.emitted):
                assert token == one.emitted[index] and int(decoder.phase[slot]) == one.phases[-1]
                assert torch.equal(next_fed(toy, decoder, slot, one.emitted[-1]), one.inputs[-1])
                continue
            one.emitted.append(token)
            one.phases.append(int(decoder.phase[slot]))
            if one.phases[-1] == DONE:
                one.record = decoder.record(slot)
                decoder.release(slot)
                del running[story]
                continue
            one.inputs.append(next_fed(toy, decoder, slot, token))
            if random:
                assert_replays(toy, decoder, slot, one, random)
    return seen


def known_outputs(seen: Seen, random: Random | None) -> int:
    """How many outputs the scheduler knows: all, or, now and then, not the latest, which it discarded."""
    count = len(seen.emitted)
    return random.randrange(count) if random and count and random.random() < 0.2 else count


def next_fed(toy: Toy, decoder: SoftDecoder, slot: int, token: int) -> Tensor:
    """The input [n0] of the position after the one that emitted `token`."""
    return decoder.next_input[slot].cpu().clone() if decoder.overlaid[slot] else toy.embedding[token]


def assert_replays(toy: Toy, decoder: SoftDecoder, slot: int, seen: Seen, random: Random) -> None:
    """Laying a replay of any stretch of the CoT over the embeddings of the emitted ids gives what was fed."""
    length = int(decoder.cot_length[slot])
    first = random.randrange(length)
    last = random.randint(first + 1, length)
    rows = toy.embedding[seen.emitted[first:last]].clone()
    steps, replayed = decoder.replay(slot, first, last)
    rows[torch.from_numpy(steps - first)] = replayed.cpu()
    assert torch.equal(rows, torch.stack(seen.inputs[first:last]))
