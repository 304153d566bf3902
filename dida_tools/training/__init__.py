"""Contains the training routines, and the facts that all of them share."""
