"""Tables that drafters read: counted and probed bigrams, reference texts."""
