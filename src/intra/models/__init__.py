"""Networks. InTra: patches in, inpainted patches out; the baselines: images in, images out."""

from torch import nn

from intra.config import ModelConfig
from intra.models.autoencoder import Autoencoder
from intra.models.intra import InTra
from intra.models.riad import RIAD
from intra.models.segmenter import Segmenter

__all__ = ["RIAD", "Autoencoder", "InTra", "Segmenter", "build"]


def build(config: ModelConfig) -> nn.Module:
    """The network of these settings, with fresh weights from torch's global generator."""
    if config.network == "intra":
        width = config.segmenter_width
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
            conditional_positions=config.window_shape if config.conditional_positions else None,
            mean_start=config.mean_start,
            make_segmenter=(lambda: Segmenter(channels=config.channels, width=width)) if width else None,
        )
    if config.network == "autoencoder":
        return Autoencoder(channels=config.channels, image_size=config.image_size, latent_dim=config.latent_dim)
    if config.network == "riad":
        return RIAD(channels=config.channels, base_width=config.base_width)
    raise ValueError(f"network is {config.network!r}; expected intra, autoencoder or riad")
