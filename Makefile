PYTHON ?= python3

.PHONY: demo compare test quick slow gpu setup
demo compare test quick slow gpu setup:
	$(PYTHON) dev.py $@ $(ARGS)
