"""Texts and tokens: what becomes of a document, and of what survived."""
