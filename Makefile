# `make demo` and `make test` do all their own set-up; PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs/demo

.PHONY: demo test lint docs clean
.DELETE_ON_ERROR:

$(VENV)/.package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[digits]'
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(VENV)/.package $@

# A small teacher, the student alone, the student distilled: one table.
demo: $(VENV)/.package
	rm -rf $(RUNS)
	$(BIN)/irgdistill distill --preset quickstart --method none --student cifar_resnet20 --epochs 16 --output $(RUNS)/teacher
	$(BIN)/irgdistill distill --preset quickstart --method none --student cifar_resnet14_x0_5 --output $(RUNS)/alone
	$(BIN)/irgdistill distill --preset quickstart --student cifar_resnet14_x0_5 \
		--teacher-checkpoint $(RUNS)/teacher/best.safetensors --output $(RUNS)/distilled
	$(BIN)/irgdistill eval $(RUNS)/teacher $(RUNS)/alone $(RUNS)/distilled --against $(RUNS)/teacher

# One process for each core, of one thread each: two threads in every one would wait for one another.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build dist *.egg-info
