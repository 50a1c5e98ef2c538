"""The vLLM releases that soft decoding was tested with.

The plugin patches vLLM's model runner from the inside, so another release is refused at start by `rollout.plugin` and named by
`softrl doctor`. pyproject.toml pins the newest of them.
"""

TESTED_VLLM = ("0.32.0",)
