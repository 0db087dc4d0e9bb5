"""Numeric self-check: golden bundles of the released implementation against this installation.

``bundle`` reads a bundle and turns its description into a model configuration; ``cases`` holds the seven kinds of
case; ``compare`` keeps the list of compared tensors and decides. ``mmi verify`` shows what they return.
"""
