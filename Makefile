PYTHON ?= python3

.PHONY: demo compare test slow setup
demo compare test slow setup:
	$(PYTHON) dev.py $@ $(ARGS)
