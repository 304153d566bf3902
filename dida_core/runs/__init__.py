"""A run's life and its record; lookup, environment, rerun, redaction."""
