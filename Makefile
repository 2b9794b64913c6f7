PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
SEEDS ?= 1

READY = $(VENV)/.ready

help:
	@echo "make demo [SEEDS=3]  compare CLIP and NPC on synthetic scenes; results in demo/"
	@echo "make test            run the tests"
	@echo "make lint            check the style"
	@echo "make clean           remove .venv, demo/ and caches"
	@echo "Each sets up $(VENV) first where that is missing. Variables: PYTHON, VENV, CONSTRAINTS."

demo: $(READY)
	$(VENV)/bin/python benchmarks/demo.py --seeds $(SEEDS)

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .

clean:
	rm -rf .venv demo .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(READY): requirements.txt requirements-dev.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -r requirements-dev.txt $(CONSTRAINTS:%=-c %)
	touch $@

.PHONY: help demo test lint clean
