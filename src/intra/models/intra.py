"""InTra, the inpainting transformer: patches in, inpainted patches out.

Pirnay & Chai, "Inpainting Transformer for Anomaly Detection", arXiv 2104.13897. A window of patches goes in; those that
are hidden are replaced by one learned vector and inpainted from the others. The defaults are the paper's network; the
*token* read-out and windows of any shape give the lattice variant (docs/decisions/0001-lattice.md).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from intra.geometry import hidden_places

__all__ = ["InTra"]

SMALL_HEAD_STD = 1e-3  # of a head that starts beside the mean image: close to it, and no weight without a gradient
MANY_TOKENS = 1024  # from there on the fused kernel is faster, backwards too, and keeps no matrix of all pairs
PLACES_STEP = 64  # hidden patches
POSITION_STD = 0.02  # of the position embeddings and the hidden vector at the start, as in ViT


class Attention(nn.Module):
    """Multi-head self-attention. In *feature* attention (MFSA, section 3.2) queries and keys are made by an MLP
    D → 2D → D/2 instead of a linear map D → D, so their heads are half as wide as those of the values.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, feature: bool, value_mlp: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key = (
            _mlp(embed_dim, 2 * embed_dim, embed_dim // 2) if feature else nn.Linear(embed_dim, embed_dim)
            for _ in range(2)
        )
        self.value = _mlp(embed_dim, 2 * embed_dim, embed_dim) if value_mlp else nn.Linear(embed_dim, embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Float[Tensor, "b t d"], places: Int[Tensor, " h"] | None = None) -> Float[Tensor, "*t d"]:
        """The tokens, each a mixture of all; with `places` only those, where all lie in a row, (H, D)."""
        query, key, value = (  # (B, heads, T, width)
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self._projected(x)
        )
        scale = query.shape[-1] ** -0.5
        if _fused_is_faster(query):
            lacking = value.shape[-1] - query.shape[-1]  # the fused kernel wants heads of one width; zeros add nothing
            if lacking:
                query, key = (F.pad(each, (0, lacking)) for each in (query, key))
            mixed = F.scaled_dot_product_attention(query, key, value, scale=scale)
        else:
            mixed = torch.softmax((query * scale) @ key.transpose(-2, -1), dim=-1) @ value  # (B, heads, T, width)
        mixed = mixed.transpose(1, 2).flatten(-2)  # (B, T, D)
        return self.proj(mixed if places is None else mixed.flatten(0, 1)[places])

    def _projected(self, x: Float[Tensor, "b t d"]) -> Sequence[Float[Tensor, "b t _"]]:
        """Queries, keys and values; where all are plain, by one product, but in graphs, whose layers stay apart."""
        parts = self.query, self.key, self.value
        if torch.compiler.is_compiling() or not all(isinstance(part, nn.Linear) for part in parts):
            return [part(x) for part in parts]
        weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
        return F.linear(x, weight, bias).chunk(3, dim=-1)


class Block(nn.Module):
    """Attention, then a feed-forward network; each normalised before and added to its input."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, *, feature: bool, value_mlp: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = Attention(embed_dim, num_heads, feature=feature, value_mlp=value_mlp)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = _mlp(embed_dim, int(embed_dim * mlp_ratio), embed_dim)

    def forward(self, x: Float[Tensor, "b t d"], places: Int[Tensor, " h"] | None = None) -> Float[Tensor, "*t d"]:
        """The tokens after this block; with `places` only those, where all lie in a row, (H, D)."""
        mixed = self.attn(self.norm1(x), places)
        x = (x if places is None else x.flatten(0, 1)[places]) + mixed
        return x + self.mlp(self.norm2(x))


class InTra(nn.Module):
    """The inpainting transformer.

    Args:
        num_positions: patches of the whole grid; each has its own learned position embedding.
        patch_dim: values of a patch, channels · patch_size².
        readout: "mean" maps the mean of all output tokens to the one hidden patch (the paper); "token" maps each
            hidden patch's own token, so that many may be hidden at once.
        conditional_positions: rows and cols of a window; if given, a depthwise 3 × 3 convolution over the grid of its
            tokens stands before each block (Chu et al. 2021; docs/decisions/0008-convolved.md).
        mean_start: adds a learned patch to the prediction of each position; `start_from` sets it to a mean image, so
            that what good images share need not be learnt (docs/decisions/0010-mean-start.md).
        make_segmenter: makes the network beside it that marks defects in whole photos. Called last, so that the
            transformer starts from the same weights with and without one.
    """

    def __init__(  # noqa: PLR0913  the settings of the network, all by keyword
        self, *, num_positions: int = 256, patch_dim: int = 768, embed_dim: int = 512, depth: int = 13,
        num_heads: int = 8, mlp_ratio: float = 4.0, attention: Literal["mfsa", "msa"] = "mfsa",
        value_mlp: bool = False, long_residuals: bool = True, readout: Literal["mean", "token"] = "mean",
        conditional_positions: tuple[int, int] | None = None, mean_start: bool = False,
        make_segmenter: Callable[[], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.readout = readout
        self.skips = long_residual_pairs(depth) if long_residuals else {}
        self.patch_embed = nn.Linear(patch_dim, embed_dim)
        self.pos_embed = nn.Parameter(_normal(torch.empty(num_positions, embed_dim), POSITION_STD))
        self.hidden_token = nn.Parameter(_normal(torch.empty(embed_dim), POSITION_STD))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, feature=attention == "mfsa", value_mlp=value_mlp)
            for _ in range(depth)
        )
        self.window_shape = conditional_positions
        self.pos_convs = nn.ModuleList(
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim)
            for _ in range(depth if conditional_positions else 0)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, patch_dim)
        self.mean_patches = nn.Parameter(torch.zeros(num_positions, patch_dim)) if mean_start else None
        if mean_start:
            _normal(self.head.weight, SMALL_HEAD_STD)
            nn.init.zeros_(self.head.bias)
        self.segmenter = make_segmenter() if make_segmenter else None

    def forward(
        self, patches: Float[Tensor, "b t p"], positions: Int[Tensor, "b t"], hidden: Bool[Tensor, "b t"],
        places: Int[Tensor, " h"] | None = None,
    ) -> Float[Tensor, "h p"]:  # fmt: skip
        """The inpainted patches, in the order of `patches[hidden]`, which is their target.

        Args:
            patches: pixels in [0, 1]; those of hidden patches have no influence.
            positions: each patch's place in the whole grid (`geometry.window_positions`).
            hidden: True where a patch is to be inpainted; exactly one in each row for the mean read-out.
            places: `geometry.hidden_places(hidden)`, from who knows it: then no shape depends on a value.
        """
        return self.inpaint(self.patch_embed(patches), positions, hidden, places)

    def inpaint(
        self, embedded: Float[Tensor, "b t d"], positions: Int[Tensor, "b t"], hidden: Bool[Tensor, "b t"],
        places: Int[Tensor, " h"] | None = None,
    ) -> Float[Tensor, "h p"]:  # fmt: skip
        """The same from patches that `patch_embed` has embedded: a patch in many windows needs it once."""
        places = hidden_places(hidden) if places is None else places
        tokens = self.tokens(embedded, positions, hidden)
        # no activation at the end, so pixels may leave [0, 1]
        if self.readout == "mean":
            inpainted = self.head(self.encode(tokens).mean(1))
        elif self.training:
            inpainted = self.head(self.encode(tokens, _rounded_up(places)))[:len(places)]
        else:  # without a slice, which in a graph would fix the number of images
            inpainted = self.head(self.encode(tokens, places))
        if self.mean_patches is None:
            return inpainted
        return inpainted + F.embedding(positions.flatten()[places], self.mean_patches)

    @torch.no_grad()
    def start_from(self, mean_patches: Float[Tensor, "n p"]) -> None:
        """Sets what each position's prediction starts from: the patches of a mean image, pixels in [0, 1]."""
        assert self.mean_patches is not None, "built without mean_start"
        self.mean_patches.copy_(mean_patches)

    def segment(self, photos: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h2 w2"]:
        """The segmenter's log-odds of a defect in each cell of 2 × 2 px of photos in [0, 1]."""
        assert self.segmenter is not None, "built without a segmenter"
        return self.segmenter(photos)

    def tokens(
        self, embedded: Float[Tensor, "b t d"], positions: Int[Tensor, "b t"], hidden: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b t d"]:
        """Embedded patch or hidden vector, plus position (equations 1 and 2)."""
        embedded = torch.where(hidden[..., None], self.hidden_token.to(embedded.dtype), embedded)
        return embedded + F.embedding(positions, self.pos_embed)

    def encode(
        self, tokens: Float[Tensor, "b t d"], places: Int[Tensor, " h"] | None = None
    ) -> Float[Tensor, "*t d"]:
        """The tokens after all blocks; block depth + 1 − i also receives the output of block i.

        With `places` only those, where all lie in a row, (H, D): the last block does nothing for the others.
        """
        outputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index in self.skips:
                tokens = tokens + outputs[self.skips[index]]
            is_last = index == len(self.blocks) - 1
            tokens = block(self.add_conditional_positions(tokens, index), places if is_last else None)
            outputs.append(tokens)
        return self.norm(tokens)

    def add_conditional_positions(self, tokens: Float[Tensor, "b t d"], index: int) -> Float[Tensor, "b t d"]:
        """Before block `index`: each token with what a convolution makes of it and of its eight neighbours."""
        if self.window_shape is None:
            return tokens
        laid = tokens.transpose(1, 2).unflatten(2, self.window_shape)  # (B, D, rows, cols)
        return tokens + self.pos_convs[index](laid).flatten(2).transpose(1, 2)


def long_residual_pairs(depth: int) -> dict[int, int]:
    """Which block (0-based) also receives the output of which earlier block, as in a U-Net: i → depth + 1 − i from 1.

    The two middle blocks of an even depth are not joined: the one's output is the other's input already.

    >>> long_residual_pairs(7)
    {6: 0, 5: 1, 4: 2}
    """
    return {depth - 1 - first: first for first in range(depth // 2) if depth - 1 - first > first + 1}


def _rounded_up(places: Int[Tensor, " h"]) -> Int[Tensor, " h2"]:
    """The places, the last repeated until there are a multiple of PLACES_STEP: a training draws another number in each
    step, and kernels for a shape not met lately are compiled anew on a CPU, 2 to 4 ms a step of `fast`.
    """
    lacking = -len(places) % PLACES_STEP
    return torch.cat([places, places[-1:].expand(lacking)]) if lacking else places


def _fused_is_faster(query: Tensor) -> bool:
    """Of many tokens, everywhere; of fewer on a CPU alone, forwards, in bf16, with matrix tiles. Else attention is
    written out, and in graphs, which runtimes optimise by themselves: docs/decisions/0002-attention.md
    """
    if torch.compiler.is_compiling():
        return False
    return query.shape[-2] >= MANY_TOKENS or (
        query.device.type == "cpu" and query.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        and torch.cpu._is_amx_tile_supported())


def _normal(values: Float[Tensor, "*n"], std: float) -> Float[Tensor, "*n"]:
    """The same tensor, drawn anew; left alone where it holds nothing ("meta"), for which torch would load its compiler:
    half of the time that a model takes to load.
    """
    return values if values.is_meta else nn.init.normal_(values, std=std)


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))
