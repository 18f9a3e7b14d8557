"""Ablations: VSD with one part taken away at a time, against VSD whole, from one start and with one budget."""
