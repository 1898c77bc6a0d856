"""Studies: several heads, trained alike and measured together."""
