"""Fitting a draft head: one step, the loop, checkpoints."""
