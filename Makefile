# keeptune's commands for development; each works from a fresh clone after `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow lint bench

# torch first and by itself: an open range would fetch a build of several gigabytes.
setup: $(BIN)/keeptune

$(BIN)/keeptune: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about 2.0 GB, some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hub,bench,harness,search,quantized]'
	touch $(BIN)/keeptune

# The lab's small instruct model learns one task more; the last line printed says where the report is.
demo: setup
	$(BIN)/keeptune demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# DATA holds alpaca_en_demo.json and p3_sample/*.jsonl.gz, MODEL a small base model: see benchmarks/README.md.
DATA ?= ../shared/data
MODEL ?= ../shared/models/english-3m
TASKS := ag_news_classify_with_choices amazon_polarity_Is_this_review common_gen_Put_together \
	dbpedia_14_given_list_what_category_does_the_paragraph_belong_to glue_mrpc_same_thing glue_qqp_same_thing \
	imdb_Movie_Expressed_Sentiment wiqa_effect_with_string_answer
COMMA := ,
EMPTY :=
P3 := $(subst $(EMPTY) $(EMPTY),$(COMMA),$(patsubst %,$(DATA)/p3_sample/%.jsonl.gz,$(TASKS)))

bench: setup
	$(BIN)/python benchmarks/training.py --data alpaca=$(DATA)/alpaca_en_demo.json --data p3=$(P3) --as-shipped
	$(BIN)/python benchmarks/preparation.py --data $(DATA)/p3_sample --model $(MODEL)
	$(BIN)/python benchmarks/runs.py --data $(DATA) --model $(MODEL)
