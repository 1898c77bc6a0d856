"""What lookaheads are worth beside static lengths."""
