"""The frozen language model: loading, forward passes, masks, embedding and projection."""
