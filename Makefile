# Verism: `make` lists the verbs. Each makes the environment it needs; the second time that takes no time.
SHELL := /bin/bash
VENV ?= $(or $(VERISM_VENV),.venv)
BIN := $(VENV)/bin
ARGS ?=
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test check serve bench bench-adversary bench-algorithms bench-judges bench-realbench bench-refit bench-rewriter bench-serving bench-trainer bench-two-policies soak kill-test world vllm images lock setup clean

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

setup: ## the environment alone
	@scripts/setup.sh services trainer dev

demo: setup ## the whole system on real photographs: services, a training run, a report
	@$(BIN)/python -m examples.demo $(ARGS)

test: setup ## the tests; ARGS="-k name" narrows. vLLM's run last, in an environment that is built meanwhile; VERISM_VLLM=no builds none
	@VERISM_VLLM=$${VERISM_VLLM-build} $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

check: setup ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

serve: setup ## the small world's rewards on port 8000; CONFIG=file serves others
	@$(BIN)/verism-serve $(or $(CONFIG),examples/serve/world.yaml) $(ARGS)

bench: setup ## images per second over HTTP against a plain loop
	@$(BIN)/python -m bench $(ARGS)

bench-adversary: setup ## a frozen detector, RealGen V2's refits and Adv-GRPO's head on the small world, three seeds: hours; ARGS=--quick takes minutes
	@$(BIN)/python -m bench adversary $(ARGS)

bench-algorithms: setup ## GRPO, Guard, NFT and GARDO on the small world, three seeds each: hours; ARGS=--quick takes minutes
	@$(BIN)/python -m bench algorithms $(ARGS)

bench-judges: setup ## judges over HTTP against a plain loop and vLLM's own batches; ARGS="--dtype bfloat16"
	@$(BIN)/python -m bench.judges $(ARGS)

bench-refit: setup ## what a refit costs those who score meanwhile, and what a swap does to them; ARGS=--quick takes two minutes
	@$(BIN)/python -m bench.refit $(ARGS)

bench-realbench: setup ## 1,000 pictures through two detectors and a judge, against their own batches; ARGS="--pictures 200"
	@$(BIN)/python -m bench.realbench $(ARGS)

bench-rewriter: setup ## rollouts and training steps of a rewriter against TRL's GRPOTrainer; ARGS=--quick takes one minute
	@$(BIN)/python -m bench rewriter $(ARGS)

bench-two-policies: setup ## a rewriter and a painter: both learn, images alone, language alone; an hour
	@$(BIN)/python -m bench two-policies $(ARGS)

bench-serving: setup ## Verism against LitServe, FastAPI, Flask, infinity and Ray Serve; ARGS=--quick takes 3 minutes
	@$(BIN)/python -m bench.peers.environment
	@$(BIN)/python -m bench.serving $(ARGS)

bench-trainer: setup ## a training step against the published scripts' loop, 15 minutes; ARGS=--quick takes one
	@$(BIN)/python -m bench trainer $(ARGS)

soak: setup ## ten minutes of load, faults and new weights on a service; ARGS="--seconds 60"
	@$(BIN)/python -m bench.soak $(ARGS)

kill-test: setup ## thirty kills of a training run at random moments, each of a fresh process; ARGS=-s shows them
	@VERISM_KILLS=$${VERISM_KILLS-30} $(BIN)/python -m pytest -q --timeout 3600 tests/e2e/test_kill.py $(ARGS)

world: setup ## make the small world's weights anew
	@$(BIN)/python -m world.make $(ARGS)

vllm: setup ## an environment of vLLM's own, .venv-vllm: for a GPU where there is one, else for the CPU
	@$(BIN)/python -m services.engines.environment

images: ## build both container images and try them, with or without a Docker engine
	@scripts/images.sh

lock: setup ## write constraints.txt from the environment
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable \
	  | grep -viE '^(torch|torchvision|triton|nvidia-.*|cuda-.*|pip|verism)( @|==)'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## caches and build artefacts; not the environment, not the runs
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis constraints.new
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
