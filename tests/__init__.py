"""Tests of dida tools."""
