"""Learned draft heads, one file each."""
