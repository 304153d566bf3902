"""Contains helpers: losses, names, paths, models, data, logging."""
