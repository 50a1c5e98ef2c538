"""What is measured or endured outside the tests, each a command of its own.

| command | what |
|---|---|
| python benchmarks/gpu_check.py | every kernel on a GPU: right, fast, small in memory; and a learner step of an 8B model's shape |
| python -m benchmarks.lm_eval_agreement | the answers and log-likelihoods of multiple choice beside those of lm-eval |
| python benchmarks/trl_rloo.py | the learner's optimiser step beside that of TRL's RLOO trainer, on the same tokens |
| python -m benchmarks.soak | thousands of requests of every kind against one engine |

results/ holds what `softrl bench` and these wrote.
"""
