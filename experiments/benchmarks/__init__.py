"""Measurements of what the project promises, each against its reference in the same run."""
