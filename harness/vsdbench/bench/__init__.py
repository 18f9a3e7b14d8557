"""Measurement: the runner, the clock, the metrics and the statistics."""
