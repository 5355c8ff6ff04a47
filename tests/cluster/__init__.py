"""A package, so that fixtures of this scope end with the tests of this folder."""
