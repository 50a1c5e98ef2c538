"""Learns from trajectories: groups with rewards flow in, new weights flow out.

    Group (prompt, G samples, rewards)                                                       [rollout/trajectory.py]
      |  advantage.py   rewards -> advantages: RLOO (the paper's) or GRPO
      v
    (Trajectory, advantage / (B G)) x G
      |  batch.py       pack: a prompt stands once, its samples follow; the same number of micro-batches for every rank
      v
    PackedBatch
      |  policy.py      embed tokens, overlay the rebuilt h~, decoder layers, hidden rows          (FSDP2, one forward)
      |  attention.py   a prompt's keys are computed once and seen by all its samples
      |  losses.py      log pi of CoT steps and answer tokens -> weighted loss, residual, mismatch
      v
    Terms -- backward --> gradients, summed over micro-batches, groups and ranks
      |  optimiser.py   clip, AdamW, warm-up and cosine       metrics.py   learner/... of metrics.jsonl
      v
    weights + 1 --> full_tensors() for the push, checkpoint.py (DCP) for --resume, export.py for everyone else

learner.py strings these together for one rank; memory.py measures how large micro-batches may be where the config leaves it open.
A group is learned from as soon as it arrives, while others still decode; only `finish_step` waits for the whole batch, so the
update is exactly on-policy.
"""
