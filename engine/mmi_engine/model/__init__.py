"""The MM-Interleaved model: vision → resampler → language → image decoder, joined by MMFS.

Read in the order of the data: ``config`` (numbers only), ``vision`` and ``resampler`` (image → tokens and feature
maps), ``mmfs`` (feature maps → any query), ``language`` (tokens → hidden states), ``unet`` and ``vae`` (hidden states →
image), ``interleaved`` (the assembly and its losses), ``checkpoint`` (directories of config + safetensors).

Axis names used everywhere: B sequences, T tokens, N images (ΣN over a batch), M images that one query may see,
L levels, Q queries, H heads, P points, C channels, S = Σ_l H_l·W_l positions.
"""
