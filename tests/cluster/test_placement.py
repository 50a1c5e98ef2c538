"""What can never be placed is refused with what would help; nothing waits for nodes that are not there."""

import pytest

from cluster.placement import process_environment, require_room
from configs.errors import InputError

ENGINE, RANK = {"CPU": 1.0, "GPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}


def test_engines_and_ranks_have_room_on_several_nodes() -> None:
    require_room([ENGINE, ENGINE, RANK], [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 5.0}])
    require_room([{"CPU": 1.0}, {"CPU": 1.0}], [{"CPU": 2.0}])


def test_a_cluster_that_is_too_small_is_told_from_nodes_that_are() -> None:
    with pytest.raises(InputError, match="need 9 GPUs, the cluster has 8; lower them or add nodes"):
        require_room([ENGINE, ENGINE, RANK], [{"CPU": 8.0, "GPU": 4.0}] * 2)
    with pytest.raises(InputError, match=r"^engine.tensor_parallel = 4: .* in one node, the largest here has 2; lower it$"):
        require_room([ENGINE, RANK], [{"CPU": 8.0, "GPU": 2.0}] * 4)


def test_memory_is_kept_where_tensors_are_the_hosts() -> None:
    assert process_environment(0)["MALLOC_MMAP_MAX_"] == "0"
    assert not any(name.startswith("MALLOC") for name in process_environment(1))
    assert process_environment(1)["OMP_WAIT_POLICY"] == "PASSIVE"
