"""Swap fused layers into a vision transformer of timm, transformers or open_clip, or into your own.

``patch(model)`` returns a report and changes the model in place, ``unpatch(model)`` undoes it. :class:`Rule` teaches
``patch`` a class of yours.
"""

from eva02_kernels.patching._core import Kept, PatchReport, Replaced, Rule, VerificationError, patch, unpatch

__all__ = ["Kept", "PatchReport", "Replaced", "Rule", "VerificationError", "patch", "unpatch"]
