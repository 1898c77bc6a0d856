"""What a lookahead learns from: records of a drafter on known texts, policies on them, the fit."""
