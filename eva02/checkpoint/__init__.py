"""Checkpoints of every upstream in, and out again.

A file is read with `weights_only=True`, its container and layout are recognised, names become timm's, projections are
split or fused as the model has them, and position embedding and patch kernel are resized. Everything that is wrong is
collected before anything is written, so one `CheckpointError` lists it all and the model is as it was.

| layout | recognised by | differs from timm in |
|---|---|---|
| timm | `mlp.fc1`, `mlp.fc1_g` | - |
| asuka (EVA, EVA-CLIP) | `mlp.w12`, `mlp.w1`, `mlp.w3`, `ffn_ln` | feed-forward and bias names, stored RoPE tables |
| mmpretrain | `backbone.` | block names, everything fused, a key bias, stored RoPE tables |
| open_clip | `visual.trunk.` | that prefix |
| transformers | `vision_model.`, `timm_model.` | CLIPModel's names, everything split; or TimmWrapper's prefix |

Files: `files.py` containers, reading and writing, `layouts.py` a table for each layout and both directions, `fit.py`
what makes a state dict fit a model, `convert.py` the public functions, `report.py` what they say, `command.py` the
command.
"""

from eva02.checkpoint.convert import convert_checkpoint, load_checkpoint
from eva02.checkpoint.files import read_state_dict, save_checkpoint
from eva02.checkpoint.layouts import LAYOUTS, rope_table_error
from eva02.checkpoint.report import CheckpointError, LoadReport

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "LoadReport",
    "convert_checkpoint",
    "load_checkpoint",
    "read_state_dict",
    "rope_table_error",
    "save_checkpoint",
]
