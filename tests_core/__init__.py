"""Tests of the library and of the template; a project does not have them."""
