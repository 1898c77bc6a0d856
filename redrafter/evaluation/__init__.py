"""Ways of decoding, measured: speed, losslessness, costs, acceptance, Spec-Bench, lookaheads."""
