"""What a job needs, found out before it runs: the shipped code on tensors without content."""
