PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
SEEDS ?= 1
METHODS ?= npc_released clip_released
OUT ?= logs/reproduce

READY = $(VENV)/.ready

help:
	@echo "make demo [SEEDS=3]  compare CLIP and NPC on synthetic scenes; results in demo/"
	@echo "make reproduce DATASET=f30k ROOT=dataset/Flickr30K [METHODS=...] [NOISE=...] [SEEDS=3]"
	@echo "                     [OUT=...] [OPTIONS=...]  a table of the paper (docs/reproduce.md)"
	@echo "make reproduce DATASET=scenes  the same on drawings with a small model, in minutes"
	@echo "make test            run the tests"
	@echo "make lint            check the style"
	@echo "make clean           remove .venv, demo/ and caches"
	@echo "Each makes $(VENV) first if it is missing. Variables: PYTHON, VENV, CONSTRAINTS."

demo: $(READY)
	$(VENV)/bin/python benchmarks/demo.py --seeds $(SEEDS)

reproduce: $(READY)
	$(VENV)/bin/python benchmarks/reproduce.py $(if $(DATASET),--dataset $(DATASET)) \
		$(if $(ROOT),--dataset_root $(ROOT)) --methods $(METHODS) $(if $(NOISE),--noise $(NOISE)) \
		--seeds $(SEEDS) --out $(OUT) $(OPTIONS)

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(READY)
	$(VENV)/bin/ruff check .

clean:
	rm -rf .venv demo .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(READY): requirements.txt requirements-dev.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -r requirements-dev.txt $(CONSTRAINTS:%=-c %)
	touch $@
	@echo "For the commands of README.md: . $(VENV)/bin/activate"

.PHONY: help demo reproduce test lint clean
