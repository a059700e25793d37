PYTHON ?= python3

.PHONY: demo test slow setup
demo test slow setup:
	$(PYTHON) dev.py $@ $(ARGS)
