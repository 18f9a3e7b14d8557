"""Drafter architectures, one file each."""
