"""Configs of live objects: keys, checks, capture and restore, overrides."""
