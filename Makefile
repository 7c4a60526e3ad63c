# Each target makes its own virtual environment where there is none, with every package as pinned in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: quickstart test check docs notebooks clean

quickstart: $(VENV)/core
	$(BIN)/shoal evolve recipes/quickstart.yaml --run runs/quickstart

test: $(VENV)/test
	$(BIN)/pytest -n 2 --dist loadfile

check: $(VENV)/test docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/test
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

notebooks: $(VENV)/test
	$(BIN)/python notebooks/execute.py

# torch first: what else needs it then takes the pinned build
$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/test: $(VENV)/core
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,gguf]'
	touch $@

clean:
	rm -rf $(VENV) runs
