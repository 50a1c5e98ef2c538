"""What is measured or endured outside the tests, each a command of its own.

| command | what |
|---|---|
| python benchmarks/gpu_check.py | every kernel on a GPU: right, fast, small in memory; and a learner step of an 8B model's shape |
| python -m benchmarks.soak | thousands of requests of every kind against one engine |

results/ holds what `softrl bench` and these wrote.
"""
