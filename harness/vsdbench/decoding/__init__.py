"""The main path: draft a tree, verify it with one target forward, commit what was accepted."""
