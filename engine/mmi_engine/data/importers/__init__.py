"""Other people's data sets as manifests: `mmi data import FORMAT SRC --out DIR`.

``base`` writes the manifest and counts what is dropped and why; each further file reads one family of formats row by
row. A reader is a generator of manifest rows: it drops what it cannot use through the `Sink` it is given, and never
replaces or invents anything.
"""
