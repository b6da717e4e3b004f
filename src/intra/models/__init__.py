"""Networks: patches in, inpainted patches out."""

from torch import nn

from intra.config import ModelConfig
from intra.models.intra import InTra

__all__ = ["InTra", "build"]


def build(config: ModelConfig) -> nn.Module:
    """The network of these settings, with fresh weights from torch's global generator."""
    return InTra(
        num_positions=config.grid[0] * config.grid[1],
        patch_dim=config.channels * config.patch_size**2,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        attention=config.attention,
        value_mlp=config.value_mlp,
        long_residuals=config.long_residuals,
        readout=config.readout,
    )
