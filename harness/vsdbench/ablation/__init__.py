"""Ablations: VSD against VSD without a part and against other objectives, from one start and with one budget."""
