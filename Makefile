PYTHON ?= python3

.PHONY: demo compare test quick slow docs gpu release setup
demo compare test quick slow docs gpu release setup:
	$(PYTHON) dev.py $@ $(ARGS)
