"""The embedded picture-book world: drawn scenes with exact truth, their texts, a tokenizer and an oracle.

Flow: `world` (what is in a scene) → `draw` (pixels and semantic map) and `texts` (captions, questions, boxes, stories)
→ `dataset` (manifests and PNGs); `oracle` reads attributes back from pixels, `score` turns readings into figures.
Pictures are 128 × 128 px RGB. Source: the specification of the embedded world in docs/toon-world.md.
"""
