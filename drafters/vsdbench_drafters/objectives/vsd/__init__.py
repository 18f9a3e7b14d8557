"""Variational Speculative Decoding (arXiv 2602.05774), reconstructed: see ``docs/vsd.md``.

The paper publishes no code. What follows its abstract and objective, and what is this project's reconstruction, is
said function by function; every reconstructed piece can be switched off or replaced by itself.
"""
