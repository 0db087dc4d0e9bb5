"""Weights on their way in and out: released checkpoints, model directories, parts of other models, memory, placement.

    shards.py     files of tensors, opened lazily and checked
    released.py   released names and shapes against the model that they are for
    importing.py  released checkpoint → model directory, bounded memory, resumable
    store.py      safetensors written tensor by tensor, split into files
    find.py       what `--model` names: a directory of ours, a released one, a hub id
    parts.py      vision trunk, language model, U-Net and VAE of the libraries
    assemble.py   parts → a model that can be trained
    estimate.py   memory of weights, KV cache and image features
    placement.py  which layers live on which device
    card.py       README.md of a model directory

Heavy libraries are imported where they are used: `find` and `store` also serve commands that load no model.
"""
