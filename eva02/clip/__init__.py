"""EVA-CLIP: image and text towers, zero-shot classification, retrieval.

>>> import eva02.clip
>>> model = eva02.clip.create_model("EVA02-CLIP-B-16")
>>> image, text, logit_scale = model(images, eva02.clip.tokenize(["a photo of a cat"]))
"""

from eva02.clip.config import ClipConfig, TextConfig, clip_config, list_models
from eva02.clip.model import Clip, create_model
from eva02.clip.retrieval import retrieval_recall
from eva02.clip.text import TextTower, tokenize
from eva02.clip.zero_shot import class_embeddings, imagenet_prompts, zero_shot_accuracy

__all__ = [
    "Clip",
    "ClipConfig",
    "TextConfig",
    "TextTower",
    "class_embeddings",
    "clip_config",
    "create_model",
    "imagenet_prompts",
    "list_models",
    "retrieval_recall",
    "tokenize",
    "zero_shot_accuracy",
]
