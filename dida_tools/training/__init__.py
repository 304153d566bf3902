"""The training routines, and the config that all of them share."""
