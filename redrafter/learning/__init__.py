"""A head that learns from the text that it drafts, and the alarm for one that no longer fits."""
