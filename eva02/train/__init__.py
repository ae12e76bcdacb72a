"""Training: one loop for all tasks.

`loop.py` steps, `optim.py` decides by how much, `state.py` keeps what a resumed run needs, `distributed.py` has several
processes agree, `progress.py` shows. A task (`pretrain.py`, `finetune.py`, `clip.py`) gives the model and the loss of a
batch; `command.py` is what their commands share.
"""
