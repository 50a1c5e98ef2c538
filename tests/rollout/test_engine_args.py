"""What an engine of several ranks is started with, and which are refused before one is."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from rollout.engine_args import engine_environment, require_splits


def test_ranks_share_no_core_and_have_equally_many() -> None:
    assert engine_environment([4, 5, 6])["VLLM_CPU_OMP_THREADS_BIND"] == "4,5,6"
    split = engine_environment([3, 4, 5, 6, 7], ranks=2)
    assert (split["VLLM_CPU_OMP_THREADS_BIND"], split["OMP_NUM_THREADS"]) == ("3,4|5,6", "2")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine_environment(None, ranks=8)


def test_more_ranks_than_cores_are_refused() -> None:
    with pytest.raises(InputError, match=r"^engine.tensor_parallel = 3: .*an engine has 2 here; lower it or engine.count.*$"):
        engine_environment([0, 1], ranks=3)


def checkpoint(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "possible"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}, {1, 3}),
        ({"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}, {1, 2, 4, 8, 16, 32}),
        ({"text_config": {"num_attention_heads": 4, "intermediate_size": 6}}, {1, 2}),
        ({"hidden_size": 64}, set(range(1, 10))),  # a config that says nothing is left to vLLM
    ],
)
def test_a_model_is_split_only_where_its_heads_are(tmp_path: Path, config: dict[str, Any], possible: set[int]) -> None:
    model = checkpoint(tmp_path, **config)
    for ranks in range(1, max(possible) + 1):
        if ranks in possible:
            require_splits(model, ranks)
        else:
            told = ", ".join(map(str, sorted(possible)))
            with pytest.raises(InputError, match=f"^engine.tensor_parallel = {ranks}: expected one of {told}: .*heads[^\n]*$"):
                require_splits(model, ranks)
