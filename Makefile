# make run    install into .venv and run SFT, reward model and PPO on the embedded data
# make test   install and run the tests
# make check  style, types, layers
# make docs   write docs/configuration.md from conf/ and rlhf_engine/config, docs/layers.svg from the imports
# make chaos  runs killed at random and started again, held to one that was not: RUNS=30 SEED=1
# make bench-kernels   the kernels beside plain torch and public ones: benchmarks/results/kernels.csv and kernels.png
# make bench-schedule  idle time of pipelines, roles apart and in one stream: benchmarks/results/schedule.csv
# make bench-plan     plans beside measured seconds and memory: benchmarks/results/plan.csv
# make bench-ppo      a whole PPO step against TRL's PPOTrainer: benchmarks/results/ppo.csv
# make bench-fidelity  20 steps of SFT, reward model, DPO, KTO, GRPO and others beside TRL's: benchmarks/results/fidelity.csv
# make bench-convert    import and export of a checkpoint beside reading and writing its bytes; BENCH='--gb 4'
# make bench-checkpoint  what a save costs the loop, waited for or not: benchmarks/results/checkpoint.csv
# make bench-data     preparing a data set against datasets.map; BENCH='--tokenizer DIR --file ROWS.jsonl.gz'
# make bench-curves   every algorithm on the embedded data, three seeds: benchmarks/results/curves.csv
# make bench-rollout  generation against transformers' generate; BENCH='--stories DIR --layout 1x2t dp2 tp2'
# make bench-turns    rollouts of several turns whose answers take a while: benchmarks/results/turns.csv
PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN ?= +exp=hh_rlhf

# one environment per Python version, so that PYTHON=python3.12 does not disturb the other
VENV := .venv$(shell $(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; print("" if v == "3.11" else "-" + v)')
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: install run test check docs chaos bench-kernels bench-schedule bench-checkpoint bench-convert bench-rollout bench-data bench-ppo bench-fidelity bench-curves bench-plan bench-turns format clean

install: $(STAMP)

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit("Python 3.11, 3.12 or 3.13 is needed, this is %d.%d: make PYTHON=python3.13" % v if not (3, 11) <= v <= (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

run: install
	$(BIN)/python launch/run.py $(RUN)

test: install
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0 --timeout 900 --dist loadfile --no-loadscope-reorder $(TESTS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

docs: install
	$(BIN)/python -m rlhf_engine.launching.reference > docs/configuration.md
	PYTHONPATH=tests $(BIN)/python docs/layers.py > docs/layers.svg

chaos: install
	$(BIN)/python -W ignore tests/chaos.py $(if $(RUNS),--runs $(RUNS)) $(if $(SEED),--seed $(SEED)) $(CHAOS)

bench-kernels: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/kernels.py $(BENCH)

bench-schedule: install
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/schedule.py $(BENCH)

bench-checkpoint: install
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/checkpoint.py $(BENCH)

bench-convert: install
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/convert.py $(BENCH)

bench-plan: install
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/plan.py $(BENCH)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-rollout: install
	$(BIN)/python -W ignore benchmarks/rollout.py $(BENCH)

bench-turns: install
	$(BIN)/python -W ignore benchmarks/turns.py $(BENCH)

bench-data: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/data.py $(BENCH)

bench-curves: install
	$(BIN)/python -W ignore benchmarks/curves.py $(BENCH)

bench-fidelity: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/fidelity.py $(BENCH)

bench-ppo: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[bench]"
	$(BIN)/python -W ignore benchmarks/ppo.py $(BENCH)

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache
