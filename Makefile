# craft_nb: `make help` lists the targets. Each prepares what it needs; nothing has to be installed by hand first.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
N ?= 20
WORKERS ?= 2
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export WANDB_MODE := disabled
export OMP_WAIT_POLICY := PASSIVE
export MUJOCO_GL ?= egl
one := OMP_NUM_THREADS=1
workers = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
each = set -e; for f in $(1); do [ -e "$$f" ] || continue; echo "python $$f $(2)"; python "$$f" $(2); done

.PHONY: help setup demo study test check-tasks prepare check nbtest pytest rounding lab docs readme results bench fuzz kill-test distributed-test clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## create .venv and install everything (the other targets do it by themselves)
.venv/.ready: pyproject.toml tools/setup.sh
	@sh tools/setup.sh

demo: .venv/.ready ## simulator, teacher, cache, plain fine-tuning and CRaFT, report: outputs/demo/report.html; ARGS=--policy=act: with an ACT
	craft-demo $(ARGS)

study: .venv/.ready ## methods x knobs x seeds on the demo's workload, losses only: outputs/study/demo.html; ARGS=--quick: one seed, three methods
	craft-study $(ARGS)

test: .venv/.ready ## everything that CI runs: checks, notebooks, site, pytest
	$(MAKE) --no-print-directory check
	$(MAKE) --no-print-directory nbtest
	python tools/docs.py --quiet
	$(one) python -m pytest $(workers)
	$(one) python tools/rounding.py

prepare: .venv/.ready ## before a commit: clean notebooks, export modules, write README.md
	python tools/prepare.py

check: .venv/.ready ## notebooks clean, export and README in sync, import order, undefined names, light import
	python tools/checks.py

nbtest: .venv/.ready ## run every notebook
	$(one) nbdev_test --n_workers $(WORKERS) --timing

pytest: .venv/.ready ## run tests/
	$(one) python -m pytest $(workers)

rounding: .venv/.ready ## numeric notebooks and tests with rounding moved: other kernels, another number of threads
	$(one) python tools/rounding.py

lab: export HF_HUB_OFFLINE := 0
lab: export TRANSFORMERS_OFFLINE := 0
lab: export HF_DATASETS_OFFLINE := 0
lab: .venv/.ready ## JupyterLab on the notebooks
	cd nbs && jupyter lab

docs: .venv/.ready ## the site, from the notebooks, into _docs
	python tools/docs.py

readme: .venv/.ready ## README.md from nbs/index.ipynb
	python tools/readme.py

results: .venv/.ready ## the demo's figures into nbs/index.ipynb and README.md (after make demo)
	python tools/results.py

bench: .venv/.ready ## every benchmark of bench/; ARGS="--size pi0_fast" goes to each
	@$(call each,bench/bench_*.py,$(ARGS))

check-tasks: .venv/.ready ## do the demo's tasks need sight? the policy trained on grey images and constant actions, at most 20 % each
	craft-demo check-tasks

fuzz: .venv/.ready ## damage caches and draw configs at random, N times each (N=20)
	@export $(one); $(call each,tests/fuzz_*.py,$(N))

kill-test: .venv/.ready ## kill training and cache builds at N random moments, resume, compare bit for bit (N=20)
	@export $(one); $(call each,tests/kill_*.py,$(N))

distributed-test: .venv/.ready ## 2-rank DDP and FSDP against one rank, and both launchers
	$(one) python -m pytest -m '' tests/test_distributed*.py

clean: ## remove what the targets made, except .venv and outputs
	rm -rf _docs _proc dist .pytest_cache .ruff_cache .hypothesis *.egg-info
