"""Training: a recipe (TOML) names the task, the data, the model and the numbers; one loop runs every recipe.

    recipe.py  TOML + command-line overrides → frozen :class:`~mmi_engine.train.recipe.Recipe`, origin of each value
    start.py   recipe → run directory, task, loop
    loop.py    the loop, over accelerate           optim.py   parameter groups, schedule, EMA
    vae.py     task: the image codec               interleaved.py  task: the whole model
    cache.py   rendered pictures and latents       data.py    (seed, index) → training sequence
    checkpoints.py  exact resume                   curves.py  metrics.jsonl → curves.png

Nothing heavy is imported here: ``mmi train --help`` and ``--dry-run`` must answer without torch.
"""
