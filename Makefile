# Each target makes the environment that it needs first, and reuses it while it is current.
#   make test VENV=/path/to/env      use (and complete) another environment
#   make test PYTHON=python3.12      make the environment with another Python
#   make test ARGS="-k config -x"    hand arguments on to the command

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python

# A stamp belongs to one checkout, since the package is installed in place; it is written last, so that an
# interrupted installation is taken up again, and it is out of date when pyproject.toml is newer.
CHECKOUT := $(shell printf %s '$(CURDIR)' | cksum | cut -d' ' -f1)
CORE := $(VENV)/.taming-$(CHECKOUT)-core
DEV := $(VENV)/.taming-$(CHECKOUT)-dev
BROKEN := $(shell $(PY) -c '' 2>/dev/null || echo FORCE)

.PHONY: help demo test test-lowest lint bench env clean clean-venv FORCE
.DEFAULT_GOAL := help

help:
	@echo "make demo        train both stages on built-in landscapes and generate images: minutes, no GPU"
	@echo "make test        run the tests"
	@echo "make test-lowest run them in .venv-lowest, with the lowest versions that pyproject.toml allows"
	@echo "make lint        check style and types"
	@echo "make bench       measure speed and memory; ARGS=--list lists the parts"
	@echo "make env         install the package for development into $(VENV)"
	@echo "make clean       remove build products and caches; make clean-venv removes the environments"

demo: $(CORE)
	$(PY) scripts/demo.py $(ARGS)

test: $(DEV)
	$(PY) -m pytest $(ARGS)

# In an environment of its own, unless VENV names one.
test-lowest:
	$(MAKE) test VENV='$(if $(filter file,$(origin VENV)),.venv-lowest,$(VENV))' \
	  PIP_ARGS='--constraint tests/lowest.txt'

lint: $(DEV)
	$(PY) -m ruff check $(ARGS) .
	$(PY) -m mypy

bench: $(CORE)
	$(PY) -m benchmarks $(ARGS)

env: $(DEV)

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# $(call install,REQUIREMENT)
define install
	@test -x $(PY) || $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null) || found="not to be found"; \
	  echo "$(PYTHON) is $$found, and this needs Python 3.11 or newer;" \
	    "name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || { \
	  if test -f $(VENV)/pyvenv.cfg; then rm -f $(VENV)/bin/python $(VENV)/bin/python3; fi; \
	  echo "making the environment $(VENV)"; $(PYTHON) -m venv $(VENV); } || { \
	  echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PY) -c '$(NEW_ENOUGH)' || { \
	  echo "$(VENV) holds $$($(PY) --version), and this needs Python 3.11 or newer;" \
	    "use another folder: make $(MAKECMDGOALS) VENV=another" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade
	@rm -f $(VENV)/.taming-*
	@echo "installing into $(VENV); the first time, PyTorch is a download of a few gigabytes"
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --editable '$(1)'
endef

$(CORE): pyproject.toml $(BROKEN)
	$(call install,.)
	@touch $@

$(DEV): pyproject.toml $(BROKEN)
	$(call install,.[dev])
	@touch $(CORE) $@

FORCE:

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

clean-venv:
	rm -rf .venv .venv-lowest
