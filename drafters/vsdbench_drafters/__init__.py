"""Drafters for vsdbench: architectures, objectives and training. They import the harness, never the reverse."""
