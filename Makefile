# `make demo` and `make test` do all their own set-up; PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs/demo

.PHONY: demo test lint docs wheel clean
.DELETE_ON_ERROR:

$(VENV)/.package: pyproject.toml
	@echo "Installing irgdistill, torch and timm into $(VENV), once: two to five minutes, most of it the download of torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[digits]'
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(VENV)/.package $@

# A small teacher, the student alone, the student distilled: one table, and one page of their graphs.
demo: TRAIN = $(BIN)/irgdistill train --quiet --preset quickstart
demo: $(VENV)/.package
	@rm -rf $(RUNS)
	@echo "1/4  A teacher, cifar_resnet20, learns 899 images of handwritten digits: 16 epochs"
	@$(TRAIN) --model cifar_resnet20 --epochs 16 --output $(RUNS)/teacher
	@echo "2/4  A small student, cifar_resnet14_x0_5, learns them alone: 8 epochs"
	@$(TRAIN) --model cifar_resnet14_x0_5 --output $(RUNS)/alone
	@echo "3/4  The same student learns them under the teacher: 8 epochs"
	@$(BIN)/irgdistill distill --quiet --preset quickstart --student cifar_resnet14_x0_5 \
		--teacher-checkpoint $(RUNS)/teacher --output $(RUNS)/distilled
	@echo "4/4  All three on 898 other images, and how the students relate 60 of them"
	@$(BIN)/irgdistill eval $(RUNS)/teacher $(RUNS)/alone $(RUNS)/distilled --against $(RUNS)/teacher
	@$(BIN)/irgdistill inspect-graph $(RUNS)/distilled --compare $(RUNS)/alone --images 60 --output $(RUNS)/graphs > /dev/null
	@echo "The table shows what a teacher adds: one student from the same first weights, trained on labels alone and distilled;" \
		"open $(RUNS)/graphs/report.html in a browser to see how both relate the same images."

# One process for each core, of one thread each: two threads in every one would wait for one another.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

wheel: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info
