"""Suites: prompts with a version, a source, a licence and a hash."""
