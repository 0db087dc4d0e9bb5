"""Generation: text (``text``), pictures (``image``), and documents that mix both (``interleave``).

``settings`` holds what a user may choose; nothing else of this package is needed to parse a command line.
"""
