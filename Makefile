PYTHON ?= python3

.PHONY: demo compare test quick slow docs gpu setup
demo compare test quick slow docs gpu setup:
	$(PYTHON) dev.py $@ $(ARGS)
