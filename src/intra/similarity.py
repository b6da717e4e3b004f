"""How alike two images are at each pixel: one implementation for the loss and for the anomaly map.

SSIM: Wang et al., "Image quality assessment", 2004. GMS: Xue et al., "Gradient magnitude similarity deviation", 2013.
Both maps lie at 1 where the images agree, and keep the size, the channels and the dtype of their input.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["Difference", "box_blur", "gms_map", "multiscale_difference", "reduced", "ssim_map"]

SSIM_WINDOW = 11  # px; with SSIM_SIGMA as in Wang et al. 2004
SSIM_SIGMA = 1.5
C1_SSIM = 0.01**2  # for pixels in [0, 1]
C2_SSIM = 0.03**2
C_GMS = 0.0026  # 170 / 255**2, Xue et al. 2013
ROOT_EPSILON = 1e-12  # keeps the gradient of the root finite on flat patches; far below C_GMS

Difference = Literal["gms", "ssim", "squared"]


def ssim_map(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Structural similarity in [-1, 1] at each pixel, for pixels in [0, 1]. Beyond the border the edge is repeated."""
    kernel = _gaussian(SSIM_WINDOW, SSIM_SIGMA)
    stack = torch.cat([x, x * x + y * y, x * y])  # of the variances the sum counts; y apart: it may need no gradient
    # unflatten, not chunk: in a traced graph that would fix the number of images
    mean_x, mean_squares, mean_xy = _separable(stack, kernel, kernel).unflatten(0, (3, x.shape[0])).unbind()
    mean_y = _separable(y, kernel, kernel)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = mean_xy - product, mean_squares - squares
    return (2 * product + C1_SSIM) / (squares + C1_SSIM) * (2 * covariance + C2_SSIM) / (variances + C2_SSIM)


def gms_map(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Gradient magnitude similarity in [0, 1] at each pixel, for pixels in [0, 1]: Prewitt / 3, c = 0.0026."""
    magnitude_x, magnitude_y = _gradient_magnitude(x), _gradient_magnitude(y)  # apart: y may need no gradient
    return (2 * magnitude_x * magnitude_y + C_GMS) / (magnitude_x**2 + magnitude_y**2 + C_GMS)


def multiscale_difference(
    x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"], *, scales: tuple[int, ...], kind: Difference
) -> Float[Tensor, "b h w"]:
    """How far two images lie apart, at the full size, averaged over the channels and over the scales.

    The kind "gms" is 1 − GMS in [0, 1], "ssim" is 1 − SSIM in [0, 2], "squared" the squared difference. Both images are
    reduced by each of the scales first.
    """
    size = x.shape[-2:]
    total = x.new_zeros(x.shape[0], 1, *size)
    for scale in scales:
        difference = _difference(reduced(x, scale), reduced(y, scale), kind).mean(1, keepdim=True)
        total = total + F.interpolate(difference, size=size, mode="bilinear", align_corners=False)
    return (total / len(scales)).squeeze(1)


def reduced(images: Float[Tensor, "b c h w"], scale: int) -> Float[Tensor, "b c h2 w2"]:
    """The images with every square of `scale` px turned into one, its mean; what is over at the border too."""
    return images if scale == 1 else F.avg_pool2d(images, scale, ceil_mode=True, count_include_pad=False)


def box_blur(maps: Float[Tensor, "b h w"], size_px: int) -> Float[Tensor, "b h w"]:
    """The mean of the `size_px` square around each pixel (odd); the part beyond the border does not count."""
    if maps.device.type == "cpu" and not torch.compiler.is_compiling():
        return _running_mean(_running_mean(maps, size_px, -2), size_px, -1)
    reach = size_px // 2  # on a GPU, and in graphs, two kernels rather than many
    rows = F.avg_pool2d(maps, (size_px, 1), stride=1, padding=(reach, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, size_px), stride=1, padding=(0, reach), count_include_pad=False)


def _difference(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"], kind: Difference) -> Float[Tensor, "b c h w"]:
    if kind == "gms":
        return 1 - gms_map(x, y)
    if kind == "ssim":
        return 1 - ssim_map(x, y)
    if kind == "squared":
        return (x - y).square()
    raise ValueError(f"kind is {kind!r}; expected gms, ssim or squared")


def _running_mean(maps: Float[Tensor, "b h w"], size_px: int, dim: Literal[-2, -1]) -> Float[Tensor, "b h w"]:
    """The mean of the values around each along one dimension, by sums of shifted maps: in fp32 the same to the last bit
    as average pooling, which takes ten times as long on a CPU for 3 and 9 px, five times for 31.
    """
    length = maps.shape[dim]
    reach = min(size_px // 2, length - 1)
    padded = F.pad(maps, (reach, reach) if dim == -1 else (0, 0, reach, reach))
    total = padded.narrow(dim, 0, length).clone()
    for start in range(1, 2 * reach + 1):
        total += padded.narrow(dim, start, length)
    place = torch.arange(length)
    count = (place + reach).clamp(max=length - 1) - (place - reach).clamp(min=0) + 1
    return total / (count if dim == -1 else count[:, None])


def _gradient_magnitude(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    smooth, slope = torch.tensor([1.0, 1.0, 1.0]) / 3, torch.tensor([1.0, 0.0, -1.0])
    vertical = _separable(images, slope, smooth)
    horizontal = _separable(images, smooth, slope)
    return (vertical**2 + horizontal**2 + ROOT_EPSILON).sqrt()


def _separable(
    images: Float[Tensor, "b c h w"], rows: Float[Tensor, " k"], cols: Float[Tensor, " l"]
) -> Float[Tensor, "b c h w"]:
    """Each channel filtered along its rows and cols with odd kernels, the edge repeated beyond the border.

    A filter is a matrix here: for thousands of small patches two matrix products are some 50 times faster than a
    convolution on a CPU.
    """
    h, w = images.shape[-2:]
    with torch.autocast(images.device.type, enabled=False):  # SSIM's variances are differences: bf16 would leave noise
        along_rows, along_cols = (_filter_matrix(kernel, size).to(images, non_blocking=True)
                                  for kernel, size in ((rows, h), (cols, w)))
        return along_rows @ images @ along_cols.T


def _filter_matrix(kernel: Float[Tensor, " k"], size: int) -> Float[Tensor, "size size"]:
    reach = len(kernel) // 2
    source = (torch.arange(size)[:, None] + torch.arange(-reach, reach + 1)).clamp(0, size - 1)  # (size, k)
    return torch.zeros(size, size, dtype=kernel.dtype).scatter_add_(1, source, kernel.expand(size, -1))


def _gaussian(size: int, sigma: float) -> Float[Tensor, " k"]:
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    weight = torch.exp(-(offset**2) / (2 * sigma**2))
    return weight / weight.sum()
