"""Configurations: found, composed, checked against the constructors they name, and built.

``from seqzoo.config.compose import compose, build``. Nothing here starts jax.
"""
