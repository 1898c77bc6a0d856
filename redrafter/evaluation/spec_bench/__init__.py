"""Spec-Bench's protocol: questions, answer files, figures by task."""
