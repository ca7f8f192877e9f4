# make tour    install, quantise the bundled model, write build/tour.html
# make lab     open the notebooks in JupyterLab
# make test    everything CI runs
# make help    the rest: explorers, site, class tools
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   ?= .venv
# make EXTRAS=lab,test installs less; CI adds ray,eval,compressed, with which no test is skipped for want of a package
EXTRAS ?= lab,app,test,browser,kernels
BIN     = $(VENV)/bin
# OpenMP threads that spin while they wait make short operations crawl on a busy machine
export OMP_WAIT_POLICY = passive

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qoqlab needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$(EXTRAS)]'
	@$(BIN)/python -c "import compileall, re, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, \
	  workers=0, rx=re.compile(r'/(tests|transformers/models|_inductor|mypy|pip)/'))" # what is seldom imported can wait
	@touch $@

setup: $(VENV)/.installed  ## make .venv and install everything into it

tour: setup  ## the main job: quantise the bundled model, print the comparison, write build/tour.html
	$(BIN)/qoqlab-tour --out build/tour.html

lab: setup  ## open JupyterLab on the notebooks (as root: make lab ARGS=--allow-root)
	$(BIN)/jupyter lab notebooks $(ARGS)

app: setup  ## serve the explorers as web pages
	$(BIN)/voila notebooks/explorers $(ARGS)

site: setup  ## the course as web pages that work offline, in build/site
	$(BIN)/python -m qoqlab.site

student: setup  ## a hand-out of the course without solutions, in build/student
	$(BIN)/python -m qoqlab.classroom student

grade: setup  ## check a submission: make grade NOTEBOOK=path/to/02_progressive_weights.ipynb
	$(BIN)/python -m qoqlab.classroom grade $(NOTEBOOK)

# mypy, on one processor for a minute, runs beside the unit tests; its verdict comes after theirs
test: style  ## everything CI runs: lint, unit tests, doctests, notebooks
	@mkdir -p build
	$(BIN)/mypy >build/mypy.txt 2>&1 & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types; types=$$?; cat build/mypy.txt; exit $$((tests ? tests : types))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -p no:doctest -o addopts= --nbval --nbval-current-env \
	  --nbval-cell-timeout=120 --nbval-sanitize-with=notebooks/nbval_sanitize.cfg notebooks

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style  ## ruff and mypy
	$(BIN)/mypy

refresh: setup  ## run all notebooks again and store their outputs
	$(BIN)/python notebooks/refresh.py

clean:  ## remove everything that make made
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

.PHONY: setup tour lab app site student grade test style lint refresh clean help
