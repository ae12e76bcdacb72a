"""EVA-02 on fused kernels: a thin model with timm's names and outputs, and a loader for every upstream's files.

>>> import eva02
>>> model = eva02.create_model("eva02_tiny_patch14_224", num_classes=10)
>>> report = eva02.load_checkpoint(model, "eva02_Ti_pt_in21k_p14.pt")
"""

from eva02.checkpoint import (
    CheckpointError,
    LoadReport,
    convert_checkpoint,
    load_checkpoint,
    read_state_dict,
    save_checkpoint,
)
from eva02.config import ModelConfig, list_models, model_config
from eva02.model import Eva02, Eva02Mim, create_model
from eva02.resize import resize_patch_kernel, resize_pos_embed

__all__ = [
    "CheckpointError",
    "Eva02",
    "Eva02Mim",
    "LoadReport",
    "ModelConfig",
    "convert_checkpoint",
    "create_model",
    "list_models",
    "load_checkpoint",
    "model_config",
    "read_state_dict",
    "resize_patch_kernel",
    "resize_pos_embed",
    "save_checkpoint",
]
