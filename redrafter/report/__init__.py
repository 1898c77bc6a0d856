"""Pages to look at: all that is known of a head, and what rows of text teach."""
