# make demo        train a small model with soft tokens on this machine      make demo mode=hard   the same with hard tokens
# make test        every test, the fast ones first                           make check            lint, format and types
# make study       the longest tests: a matrix of runs, evaluated, interrupted, reported
# make setup       only the environment; the others do it by themselves, once, and again when pyproject.toml changes

PYTHON ?= python3
mode ?= soft
ready := .venv/.ready
side_by_side := .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test study check clean

setup: $(ready)

$(ready): pyproject.toml setup.sh
	@PYTHON="$(PYTHON)" bash setup.sh
	@touch $@

demo: $(ready)
	.venv/bin/softrl train configs/demo.yaml policy.mode=$(mode) run.name=demo_$(mode)_$(shell date +%m%d-%H%M%S)

test: $(ready)
	$(side_by_side) -m "not slow and not study"
	$(side_by_side) -m "slow and not study"

study: $(ready)
	.venv/bin/python -m pytest -q -m study

check: $(ready)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
