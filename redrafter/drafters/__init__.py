"""Who proposes: learned heads, tables, lookup, second models."""
