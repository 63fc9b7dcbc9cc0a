# Two commands do everything on a fresh machine: `make quickstart` and `make test`. While you work: `make check`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STDLIB = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")
SOURCE ?=
TEXT ?=
RANKS ?= 2
RUN ?=
STEPS ?= 200
NANOGPT ?=

# PyPI's torch for Linux brings several GB of CUDA. Without an NVIDIA driver its CPU build is enough.
TORCH_CPU ?= https://download.pytorch.org/whl/cpu

CHECK := not launch and not root and not browser and not slow

.PHONY: quickstart shakespeare speedrun install check check-pythons test invariance gpu-check packages lint clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! $(BIN)/python -c "import torch" 2>/dev/null; then \
	  echo "no NVIDIA driver here: installing torch's CPU build from $(TORCH_CPU)"; \
	  $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --timeout 10 --retries 1 \
	    --index-url $(TORCH_CPU) torch || echo "note: that failed, so PyPI's torch with CUDA follows (several GB)"; \
	fi
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/python -m compileall -q data model launch  # with PYTHONDONTWRITEBYTECODE every start would compile them
	$(BIN)/packspeed ops build
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	@touch $@

# The main job on Python's own standard library, or on SOURCE=path/to/text.
quickstart: install
	rm -rf tokens/quickstart
ifeq ($(SOURCE),)
	$(BIN)/packspeed tokenizer train $(STDLIB) --include '*.py' --exclude 'site-packages/*' --exclude '*test*' --vocab-size 4096 --out tokens/quickstart.json
	$(BIN)/packspeed prepare $(STDLIB) --include '*.py' --exclude 'site-packages/*' --exclude '*test*' --val-fraction 0.05 --tokenizer tokens/quickstart.json --out tokens/quickstart
else
	$(BIN)/packspeed tokenizer train $(SOURCE) --vocab-size 4096 --out tokens/quickstart.json
	$(BIN)/packspeed prepare $(SOURCE) --val-fraction 0.05 --tokenizer tokens/quickstart.json --out tokens/quickstart
endif
	$(BIN)/packspeed inspect tokens/quickstart
	. $(BIN)/activate && deepspeed --num_gpus $(RANKS) launch/train.py --config launch/configs/quickstart.yaml --fresh
	$(BIN)/packspeed generate runs/quickstart --prompt "def " --max-new-tokens 150
	@echo
	@echo "The run is in runs/quickstart. Watch its curves with: $(BIN)/tensorboard --logdir runs/quickstart/tensorboard"

# nanoGPT's character-level demo: make shakespeare TEXT=path/to/tinyshakespeare.txt (or a URL)
shakespeare: install
	@test -n "$(TEXT)" || { echo "say where the text is: make shakespeare TEXT=path-or-URL"; exit 2; }
	rm -rf tokens/shakespeare_char
	$(BIN)/packspeed prepare "$(TEXT)" --tokenizer bytes --val-fraction 0.1 --out tokens/shakespeare_char
	$(BIN)/packspeed train launch/configs/shakespeare_char.yaml --fresh
	$(BIN)/packspeed generate runs/shakespeare_char --prompt "ROMEO:" --max-new-tokens 300

# The same loss in a fraction of the time, on one rank, which needs no launcher: make speedrun TEXT=path/to/tinyshakespeare.txt
# A lower loss in the time that nanoGPT's settings take: RECIPE=speedrun_char_long
speedrun: RECIPE ?= speedrun_char
speedrun: install
	@test -n "$(TEXT)" || { echo "say where the text is: make speedrun TEXT=path-or-URL"; exit 2; }
	rm -rf tokens/shakespeare_char
	$(BIN)/packspeed prepare "$(TEXT)" --tokenizer bytes --val-fraction 0.1 --out tokens/shakespeare_char
	$(BIN)/python launch/train.py --config launch/configs/$(RECIPE).yaml --fresh

test: packages $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n 2

# Within a minute: everything that starts no process.
check: lint
	$(BIN)/python -m pytest -q -n 2 -m "$(CHECK)"

# The same on every Python from 3.10 on that this machine has, as far as neither torch nor DeepSpeed is needed.
check-pythons:
	$(PYTHON) tests/tools/check_pythons.py

# The tables of ds_configs/README.md and docs/layouts.md again, or those of your run file: make invariance RUN=my.yaml
# STEPS=50. Some rows only, printed: make invariance ONLY="SP2 zero1" STEPS=50
invariance: $(VENV)/.installed-dev
	$(BIN)/python tests/tools/invariance.py $(RUN) --steps $(STEPS) --only "$(ONLY)"

# On a machine with a GPU, in under ten minutes: make gpu-check, with nanoGPT beside it: make gpu-check NANOGPT=path
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python tests/tools/gpu_check.py --nanogpt "$(NANOGPT)"

packages:
	@bash .ci/packages

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p packspeed.model -p packspeed.data -p packspeed.launch

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
