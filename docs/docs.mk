# Documentation. A part of the Makefile.

.PHONY: doc

doc: $(DEV_READY)  ## build the documentation: docs/_build/index.html
	$(ENV_PYTHON) -m sphinx -W --keep-going -b html docs docs/_build
