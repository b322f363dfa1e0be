"""Refiners: (logits, image) -> logits, where neighbouring pixels talk."""
