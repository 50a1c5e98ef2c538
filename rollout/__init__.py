"""MAKES trajectories: tasks and prompts, the engine with its soft decoding, rewards, evaluation.

In: problems, a policy's mode, tau and sigma, and weights. Out: Trajectory, Sample and Group (rollout/trajectory.py).

    tasks -> prompt -> engine (Ray actor) ---------------- AsyncLLM ----------------> trajectory -> reward -> Group
                                |                              |                          ^
                                |   worker_extension: adapter_v1 or _v2 -> slots -> soft_decoding -> row_ops -> record
                                +-- weight_transfer <- learner.push

    a client's request -> client_options -> serving, in vLLM's own server -> slots -> ... -> text
"""

import logging
import sys

# vLLM warns while it is imported, before it has read VLLM_LOGGING_LEVEL; once it has, that level holds, in a server too, which
# imports this as a plugin.
if "vllm" not in sys.modules:
    logging.getLogger("vllm").setLevel(logging.ERROR)
