# The two commands of a newcomer are `make demo` and `make test`; each makes .venv from pinned requirements first.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
# One process has one thread unless a rule says otherwise; the scripts start as many processes as they need.
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help venv lock containers offline-bundle reproduce verify-data verify-conda verify-containers verify-pristine demo demo-all digits chat test test-units test-slurm test-fast verify-model verify-workflow verify-training verify-evaluation verify-gpu verify-report verify-clients clients verify-slurm slurm-status check audit format docs site screenshots verify-docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"expected Python 3.11 or newer, got {sys.version}"'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

venv: $(VENV)/installed  ## make .venv from the pinned requirements

demo: $(VENV)/installed  ## every dataset, method and dtype once on a CPU, then the report (3 to 6 minutes); ARGS="ROW …" runs only these rows
	snakemake --profile profiles/demo $(ARGS)

demo-all: $(VENV)/installed  ## every accuracy row and every published speed row on a CPU, then the report (about 13 minutes)
	snakemake --profile profiles/demo --config 'rows={accuracy: ["*"], speed: ["*gpu"]}'

digits: $(VENV)/installed  ## the example of your own data: real handwritten digits
	snakemake --profile profiles/demo --configfile config/digits.yaml

chat: $(VENV)/installed  ## a web page on this machine for asking a model about pictures: make chat MODEL=FOLDER [BASE=FOLDER] [ARGS="--bf16"]
	python scripts/serve.py --model_name_or_path $(MODEL) $(if $(BASE),--base $(BASE)) $(ARGS)

reproduce: $(VENV)/installed  ## the demo from scratch in another folder, compared byte by byte with stored digests (3 to 6 minutes)
	python scripts/reproduce.py $(ARGS)

# SLURM's tests mostly wait, so they run beside the others.
test: $(VENV)/installed  ## all tests except the longer ones of make verify-… (9 to 16 minutes on two cores)
	$(MAKE) --jobs 2 --keep-going test-units test-slurm

test-units: $(VENV)/installed  ## unit tests and one small workflow run for real
	pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/slurm

test-slurm: $(VENV)/installed  ## short tests on a real SLURM started here; the output is printed when they end
	@output=$$(pytest tests/slurm 2>&1); code=$$?; echo "$$output"; exit $$code

# Files and single tests that start other programs, train, compare whole gradients, or resize very large pictures.
SLOW := slurm workflow environments fakegpu gpu clients test_training_* test_evaluation_run.py test_evaluation_chat.py test_docs.py test_reporting_* \
  test_model_modeling.py test_model_runtime.py test_model_compat.py test_model_generation.py test_provenance_lineage.py \
  test_data_full_disk.py test_benchmark_speed.py
SLOW_TESTS := test_cluster.py::test_what_the_probe_runs_says_yes_or_why_training_is_refused \
  test_security.py::test_names_that_reach_a_shell_line_are_plain test_model_image_processing.py::test_golden_pictures[4598x5082_RGB_s37_c16] \
  test_model_image_processing.py::test_golden_pictures[4000x3000_RGB_s10_c16] test_data_sources.py::test_offline_takes_the_files_from_the_cache
test-fast: $(VENV)/installed  ## the tests that an edit breaks most often (about 2 minutes)
	pytest -n 2 --dist loadfile $(SLOW:%=--ignore-glob='tests/%') $(SLOW_TESTS:%=--deselect='tests/%')

verify-data: $(VENV)/installed  ## every test image of Pillow's source distribution is read, or rejected with a reason (needs the network; 1 minute)
	pytest -m verify -s tests/test_data_pillow.py

verify-training: $(VENV)/installed  ## runs killed at random moments end with the same weights (about 7 minutes)
	pytest -m verify tests/test_training_kills.py tests/test_training_optimizers.py

verify-model: $(VENV)/installed  ## every stored case of the published code, forward and backward; compiled kernels (about 4 minutes)
	pytest -m verify tests/test_model_modeling.py tests/test_model_fused.py

verify-workflow: $(VENV)/installed  ## small workflow runs with every fault: late outputs, two runs of one clone
	pytest -m 'verify or not verify' tests/workflow

verify-evaluation: $(VENV)/installed  ## answers in batches are the same as one by one, and three times as fast
	pytest -m verify -s tests/test_evaluation_speed.py

verify-gpu: $(VENV)/installed  ## every method on a fake GPU, tiny and at full size, and on a real GPU if there is one (about 15 minutes)
	pytest -n 2 --dist loadfile -m 'verify or not verify' tests/fakegpu tests/gpu

verify-docs: $(VENV)/installed  ## every command of the documentation that runs on this machine, a small demo included
	pytest -m 'verify or not verify' tests/test_docs.py

verify-report: $(VENV)/installed  ## 200 rows and 1,000,000 predictions in one report
	pytest -m verify -s tests/test_reporting_size.py

verify-slurm: $(VENV)/installed  ## every fault of a cluster, and 1,000 rows, on a real SLURM started here (needs root; 60 to 90 minutes)
	pytest -m 'verify or not verify' -s tests/slurm

CLIENTS := .clients
clients:  ## environments of the programs that verify-clients compares with (7 GB)
	tests/clients/install.sh $(CLIENTS)

verify-clients: $(VENV)/installed clients  ## checkpoints in vLLM, mistral.rs, lmms-eval and the publisher's code (PHI3V_PUBLISHER_CODE: its folder)
	PHI3V_CLIENTS=$(CLIENTS) pytest -s -m 'verify or not verify' tests/clients

CONFIG ?= config/config.yaml
slurm-status: $(VENV)/installed  ## rows, SLURM jobs, steps and time left of a run: make slurm-status CONFIG=my.yaml
	python scripts/cluster.py status --config $(CONFIG)

verify-conda: $(VENV)/installed  ## every rule in its own environment and nothing else, solved and linked by rattler from a channel made here
	pytest -m verify -s tests/environments/test_deployment.py

verify-containers: $(VENV)/installed  ## images built twice with Buildah, run in Apptainer, Charliecloud and on SLURM; needs these tools, umoci, debootstrap and root
	folder=$$(mktemp -d) && export PHI3V_IMAGES=$$folder && trap "rm -r $$folder" EXIT && \
	  pytest -m verify -s tests/environments/test_containers.py && pytest -m verify -s tests/slurm/test_images.py

verify-pristine: $(VENV)/installed  ## clone, demo and tests on a machine with python3, make and git; needs root and debootstrap (about 25 minutes)
	pytest -m verify -s tests/environments/test_pristine.py

check: $(VENV)/installed site  ## formatting, lint, types, workflow lint, documentation site
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	mypy
	snakemake --lint --configfile config/demo.yaml
	git ls-files -z | xargs -0 detect-secrets-hook --exclude-files '^(envs/.*\.txt|envs/train-cuda\.yaml|requirements\.txt|config/demo/digests\.json|tests/golden/.*|.*\.min\.js)$$'

audit: $(VENV)/installed  ## look the pinned packages up in the vulnerability data of the package index (needs the network)
	for lock in requirements.txt envs/train-cuda.txt; do \
	  pip-audit -r $$lock --no-deps --disable-pip --progress-spinner off --timeout 5 || exit 1; \
	done

format: $(VENV)/installed  ## format everything
	ruff format . && ruff check --fix . && snakefmt Snakefile workflow

# uv reads the package index, never pip's configuration, and keeps the versions of a lock that still fit. Torch on the package
# index needs the packages of cuda-only.in; its CPU build, of the same version, needs none of them.
UV_COMPILE := uv pip compile --quiet --no-config --no-annotate --custom-compile-command 'make lock' \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28 pyproject.toml
# A conda environment takes Python and pip from conda-forge, and gcc for Triton's kernels on GPUs; pip takes the rest from the lock.
lock: $(VENV)/installed  ## write requirements.txt and envs/ from pyproject.toml; ARGS="--upgrade-package NAME" updates a package to its newest version
	$(UV_COMPILE) --extra workflow --extra train --extra report --extra dev --excludes envs/cuda-only.in -o requirements.txt $(ARGS)
	$(UV_COMPILE) --extra train --constraints requirements.txt --generate-hashes -o envs/train-cuda.txt $(ARGS)
	for name in workflow data report train-cpu; do \
	  $(UV_COMPILE) --extra $${name%-cpu} --excludes envs/cuda-only.in --constraints requirements.txt -o envs/$$name.txt || exit 1; \
	done
	for name in workflow data report train-cpu train-cuda; do \
	  { printf '%s\n' '# Written by `make lock`.' 'channels: [conda-forge, nodefaults]' 'dependencies:' '  - python=3.11'; \
	    test $$name != train-cuda || echo '  - gcc'; \
	    printf '%s\n' '  - pip' '  - pip:'; \
	    sed -e ':join' -e '/\\$$/ { N; s/ *\\\n */ /; b join' -e '}' -e '/^#/d' -e 's/^/      - /' envs/$$name.txt; \
	  } > envs/$$name.yaml; \
	done

containers: $(VENV)/installed  ## build the images, convert them for Apptainer, write digests and bills of materials (needs buildah or podman, and the internet)
	containers/build.sh $(ARGS)

offline-bundle: $(VENV)/installed  ## pack source, wheels, images, data and weights for a cluster without internet
	scripts/bundle.sh phi3v-offline $(ARGS)

docs: $(VENV)/installed  ## write the generated pages of docs/reference and the schemas
	python scripts/settings_docs.py

site: $(VENV)/installed  ## build the documentation site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir site

screenshots: $(VENV)/installed  ## make the screenshots of docs/ from results/demo/report (needs chromium and its driver)
	python benchmarks/screenshots.py

clean:  ## remove the demo's results and sources (other runs stay)
	rm -rf results/demo results/demo-sources results/digits results/digits-source
