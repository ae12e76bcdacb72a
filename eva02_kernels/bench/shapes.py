"""The sizes that are measured: EVA-02's models at their benchmark batch, and one that leaves only host time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One EVA-02 model at one batch size."""

    name: str
    batch: int
    dim: int
    heads: int
    hidden: int
    depth: int
    subln: bool  # B, L: separate q, k, v and gate, up projections, LayerNorm on the hidden layer
    image: int = 224
    patch: int = 14

    @property
    def grid(self) -> tuple[int, int]:
        return self.image // self.patch, self.image // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Patches and one class token."""
        return 1 + self.patches

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def model_name(self) -> str:
        return f"eva02_{self.name}_patch{self.patch}_{self.image}"

    def block_flops(self) -> int:
        """Floating-point operations of one block's forward: its matrix products, two per multiply-add."""
        products = 4 * self.dim**2 + 3 * self.dim * self.hidden
        return 2 * self.rows * (products + 2 * self.tokens * self.dim)

    def model_flops(self, num_classes: int = 1000, channels: int = 3) -> int:
        patch = self.batch * self.patches * channels * self.patch**2 * self.dim
        return self.depth * self.block_flops() + 2 * (patch + self.batch * self.dim * num_classes)

    def describe(self) -> dict[str, int | str | bool]:
        return {
            "model": self.name,
            "batch": self.batch,
            "tokens": self.tokens,
            "dim": self.dim,
            "heads": self.heads,
            "hidden": self.hidden,
            "image": self.image,
        }


SHAPES = {
    s.name: s
    for s in (
        Shape("tiny", 8, 192, 3, 512, 12, subln=False),
        Shape("small", 8, 384, 6, 1024, 12, subln=False),
        Shape("base", 4, 768, 12, 2048, 12, subln=True),
        Shape("large", 2, 1024, 16, 2730, 24, subln=True),
        # Five tokens: arithmetic vanishes beside what a call costs on the host.
        Shape("host", 1, 32, 2, 84, 1, subln=True, image=28),
    )
}


def shape_named(name: str) -> Shape:
    """``tiny``, or in full ``eva02_tiny_patch14_224``."""
    short = name.split("_")[1] if name.startswith("eva02_") and "_" in name[6:] else name
    if short not in SHAPES or name not in (short, SHAPES[short].model_name):
        known = ", ".join([*SHAPES, *(s.model_name for s in SHAPES.values() if s.name != "host")])
        raise ValueError(f"no benchmark shape {name!r}; expected one of {known}")
    return SHAPES[short]
