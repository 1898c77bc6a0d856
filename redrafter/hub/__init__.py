"""Heads, tables and models on the Hugging Face Hub."""
