"""Tests of the library; they stay with the template."""
