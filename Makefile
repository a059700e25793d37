PYTHON ?= python3

.PHONY: demo compare test quick slow setup
demo compare test quick slow setup:
	$(PYTHON) dev.py $@ $(ARGS)
