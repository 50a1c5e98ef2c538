"""A config is checked on a login node: no module of configs brings torch, vllm or ray."""

import subprocess
import sys
from pathlib import Path

import configs

SCRIPT = """
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
from configs.load import load_config
load_config({recipe!r}, ["policy.mode=fuzzy"])
heavy = {{"torch", "vllm", "ray", "transformers", "numpy", "kernels", "rollout", "learner", "cluster"}}
print(sorted(heavy & set(sys.modules)))
"""


def test_loading_a_config_imports_nothing_heavy() -> None:
    folder = Path(configs.__file__).parent
    modules = [f"configs.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"]
    assert {"configs.schema", "configs.load", "configs.validate"} <= set(modules)
    script = SCRIPT.format(modules=modules, recipe=str(folder / "demo.yaml"))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=folder.parent)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
