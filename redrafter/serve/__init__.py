"""Heads inside of other people's engines. Each file says which engine it runs in.

Nothing here is needed for anything else, and no engine is a dependency: an engine imports the file
that is for it (`redrafter.serve.vllm`), in its own environment, where of this library only the
heads are needed (torch, transformers, safetensors). See docs/serving.md.
"""
