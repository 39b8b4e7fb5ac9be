# `make help` lists what there is.
PYTHON ?= python3
# Tests of one file share what they build; whole pipelines, which take longest, go first (tests/conftest.py).
PARALLEL := --numprocesses=2 --dist=loadscope --no-loadscope-reorder
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: ablations attack attack-study bench bench-gpu budgets check-default choose compare demo help hostile-study lint pictures poison-study \
	private-study report repro sweep table test test-quick
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

# Ends here, before anything is downloaded, where Python is of another version than pyproject.toml asks for.
.venv/ready: pyproject.toml constraints.txt
	$(if $(shell $(PYTHON) -c 'import sys; print("yes" if (3, 11) <= sys.version_info < (3, 14) else "")' 2>&1 | grep yes),,\
	  $(error $(PYTHON) is $(or $(shell $(PYTHON) --version 2>&1),not there); needed is Python 3.11, 3.12 or 3.13: name \
	  one, as in `make PYTHON=python3.12`))
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[pipeline,privacy,int4,signing,dev]'
	@.venv/bin/python -m compileall -qq -j 0 .venv/lib || true  # on all cores; templates named .py fail, harmlessly
	@touch $@

repro: .venv/ready  ## set up, then run the whole pipeline; PRESET=recommended puts a preset into params.yaml first
	$(if $(PRESET),python -m studies.preset $(PRESET))
	dvc repro

test: .venv/ready  ## set up, then run the tests
	python -m pytest $(PARALLEL)

test-quick: .venv/ready  ## what to run after an edit: no whole pipeline, and two families of all
	python -m pytest $(PARALLEL) -m "not slow"

test test-quick: export OMP_NUM_THREADS := 1

lint: .venv/ready  ## format check, linter, type checker and spelling
	ruff format --check .
	ruff check .
	mypy
	codespell

ablations: repro  ## the open questions of the method, one run each; hours
	python -m studies.ablations

choose: repro  ## which setting to ship: RECOVERY=0.9, LACKS=0.9 (nats) or BYTES=0.6; up to two hours on 2 cores
	python -m studies.choose $(foreach need,RECOVERY LACKS BYTES,$(if $($(need)),$(need)=$($(need)))) $(SET)

sweep: repro  ## the dial: alpha by beta, a table and a picture; an hour and a half on 2 cores
	python -m studies.sweep

demo: repro  ## two parties, sixteen invented facts, and what the real model says of them: three to six minutes on 2 cores
	python -m studies.demo

attack: repro  ## what an attacker makes of the package and of the adapters: restoration, weights, membership
	dvc repro studies/dvc.yaml:attack

attack-study: repro  ## the restoration attack over alpha, beta and channels.ratio, three seeds, both kinds of adapters: many hours on 2 cores
	python -m studies.attacks

private-study: repro  ## every method's package tuned with differential privacy and attacked: an hour and a half on 2 cores
	python -m studies.attacks private

hostile-study: repro  ## what an adapter tells the owner of a package with a trap, without and with privacy: ten minutes on 2 cores
	python -m studies.hostile

poison-study: repro  ## a backdoor tuned at an ordinary distance, and what `plug` says of it: forty minutes on 2 cores
	python -m studies.poison

budgets: repro  ## the attack with growing budgets, to 1 M tokens, and what 100 times more would reach; about six hours
	python -m studies.budgets $(STEPS)

bench: repro  ## ratios against the plain ways, appended to docs/benchmarks.md
	python benchmarks/bench.py

bench-gpu: .venv/ready  ## seconds and memory of every stage on a GPU, random weights: MODELS="opt-1.3b llama-7b"
	python benchmarks/gpu.py $(or $(MODELS),opt-1.3b)

report: repro  ## report.html: what was measured on one page
	python -m studies.report

pictures: .venv/ready  ## draw the pictures of docs/ anew from the figures in git
	python -m studies.pictures

compare: repro  ## all methods on one model, three tasks, three seeds, both kinds of adapters: many hours on 2 cores
	python -m studies.compare $(SET)

table: .venv/ready  ## one row of the paper's table: PRESET=opt-1.3b SET="alpha=0.5" SEEDS=0,1,2 (presets.yaml)
	python -m studies.table $(or $(PRESET),nine-tasks) $(if $(SEEDS),SEEDS=$(SEEDS)) $(SET)

check-default: repro  ## the full default run, and whether its measurements come out in the right order
	python -m pytest tests/check_default.py
