# make chat    a chat with the toy checkpoint, in a virtual environment of its own      make chat ARGS="--quantize 4"
# make test    the tests
# make lint    ruff, and a look for files over 12 MB
# make matrix  the tests on every supported release of transformers                    make matrix ARGS="--quick"
# make tiny    train the toy checkpoint again
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: chat test lint matrix tiny
.DELETE_ON_ERROR:

chat: $(VENV)/run.txt
	@$(RUN) cli_demo.py $(ARGS)

test: $(VENV)/dev.txt
	$(RUN) -m pytest $(ARGS)

lint: $(VENV)/dev.txt
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@large=$$(git ls-files -z | xargs -0 -I{} find {} -prune -type f -size +12M); \
	if [ -n "$$large" ]; then echo "over 12 MB: $$large"; exit 1; fi

matrix: $(VENV)/dev.txt
	$(RUN) tests/matrix.py $(ARGS)

tiny: $(VENV)/dev.txt
	$(RUN) examples/tiny/train.py

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV) >&2

$(VENV)/run.txt: requirements.txt constraints.txt | $(VENV)/bin/python
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt >&2
	@cp requirements.txt $@

$(VENV)/dev.txt: requirements-dev.txt requirements.txt constraints.txt | $(VENV)/bin/python
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt >&2
	@cp requirements-dev.txt $@ && cp requirements.txt $(VENV)/run.txt
