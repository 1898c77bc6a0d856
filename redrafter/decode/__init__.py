"""Draft, verify, accept, commit: the decoding loops and their parts."""
