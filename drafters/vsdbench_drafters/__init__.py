"""Drafters for vsdbench: architectures, objectives and training. Imports the harness's interfaces, never the reverse."""
