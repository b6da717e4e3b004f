"""The network: the paper's size, what each output may depend on, the long residuals, and that it can learn."""

import dataclasses
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import descend

from intra.config import PRESETS, ModelConfig, preset
from intra.geometry import random_windows, window_positions
from intra.models import InTra, build
from intra.models import intra as intra_module
from intra.models.intra import MANY_TOKENS, Attention, _fused_is_faster, long_residual_pairs

SMALL = ModelConfig(channels=2, patch_size=4, grid=(6, 5), window_size=3, embed_dim=32, depth=3, num_heads=4)
SMALL_LATTICE = dataclasses.replace(SMALL, window_size=None, readout="token")
VARIANTS = {
    "paper": SMALL,
    "lattice": SMALL_LATTICE,
    "msa": dataclasses.replace(SMALL, attention="msa"),
    "value_mlp": dataclasses.replace(SMALL, value_mlp=True),
    "no_long_residuals": dataclasses.replace(SMALL, long_residuals=False),
    "one_channel_deep": dataclasses.replace(SMALL, channels=1, depth=6, window_size=4),
    "window_with_token_readout": dataclasses.replace(SMALL, readout="token"),
    "convolved": dataclasses.replace(SMALL_LATTICE, conditional_positions=True),
    "convolved_windows": dataclasses.replace(SMALL, conditional_positions=True),
}


def make(config: ModelConfig, seed: int = 0) -> InTra:
    torch.manual_seed(seed)
    model = build(config)
    assert isinstance(model, InTra)
    return model


def windows(config: ModelConfig, count: int = 4, num_hidden: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    origins, hidden = random_windows(count, grid=config.grid, window_shape=config.window_shape,
                                     num_hidden=(num_hidden, num_hidden), generator=generator)
    patches = torch.rand(*hidden.shape, config.channels * config.patch_size**2, generator=generator)
    return patches, window_positions(origins, config.grid, config.window_shape), hidden


def num_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


def test_the_papers_size():
    paper = preset("paper").model
    assert num_parameters(paper) == pytest.approx(55.5e6, rel=2e-3)
    assert num_parameters(dataclasses.replace(paper, attention="msa")) == pytest.approx(41.9e6, rel=2e-3)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_finite_gradient(config):
    model = make(config)
    patches, positions, hidden = windows(config, count=40)
    model(patches, positions, hidden).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith(("key.2.bias", "key.bias")):  # softmax does not see a shift of all keys
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("conditional_positions", [False, True])
@pytest.mark.parametrize("num_hidden", [1, 7])
def test_hidden_pixels_have_no_influence(num_hidden, conditional_positions):
    config = dataclasses.replace(SMALL if num_hidden == 1 else SMALL_LATTICE,
                                 conditional_positions=conditional_positions)
    model = make(config)
    patches, positions, hidden = windows(config, num_hidden=num_hidden)
    patches.requires_grad_()
    model(patches, positions, hidden).square().sum().backward()
    assert patches.grad is not None
    assert patches.grad[hidden].eq(0).all()
    assert patches.grad[~hidden].abs().amax(-1).gt(0).all()


def test_a_convolved_token_sees_its_eight_neighbours():
    """In the grid, not in the order of memory: 6 rows of 5 patches."""
    model = make(dataclasses.replace(SMALL_LATTICE, conditional_positions=True))
    tokens = torch.zeros(1, 30, 32, requires_grad=True)
    model.add_conditional_positions(tokens, 0)[0, 12].sum().backward()  # row 2, col 2
    assert tokens.grad is not None
    seen = tokens.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == [6, 7, 8, 11, 12, 13, 16, 17, 18]


@pytest.mark.parametrize("config", [SMALL, SMALL_LATTICE], ids=["mean", "token"])
def test_output_stands_in_the_order_of_the_hidden_patches(config):
    model = make(config)
    patches, positions, hidden = windows(config, count=5, num_hidden=1)
    together = model(patches, positions, hidden)
    assert together.shape == patches[hidden].shape
    for index in range(5):
        one = slice(index, index + 1)
        torch.testing.assert_close(model(patches[one], positions[one], hidden[one]), together[one])


def test_rows_may_hide_different_numbers_of_patches():
    model = make(SMALL_LATTICE)
    patches, positions, _ = windows(SMALL_LATTICE, count=2)
    hidden = torch.zeros(2, 30, dtype=torch.bool)
    hidden[0, [1, 4, 9]] = True
    hidden[1, 20] = True
    together = model(patches, positions, hidden)
    torch.testing.assert_close(together[:3], model(patches[:1], positions[:1], hidden[:1]))
    torch.testing.assert_close(together[3:], model(patches[1:], positions[1:], hidden[1:]))


def test_order_of_tokens_does_not_matter_but_positions_do():
    model = make(SMALL)
    patches, positions, hidden = windows(SMALL)
    order = torch.randperm(9)
    expected = model(patches, positions, hidden)
    torch.testing.assert_close(model(patches[:, order], positions[:, order], hidden[:, order]), expected)
    assert not torch.allclose(model(patches, positions.flip(1), hidden), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("depth", "pairs"), [(13, {i: 14 - i for i in range(1, 7)}), (6, {1: 6, 2: 5}), (4, {1: 4}), (2, {}), (1, {})]
)
def test_long_residual_pairs(depth, pairs):
    """1-based as in the paper: the output of block i joins the input of block 14 - i, and no tensor joins itself."""
    assert {first + 1: second + 1 for second, first in long_residual_pairs(depth).items()} == pairs


def test_each_block_reads_the_skip_that_it_should():
    depth = 5
    model = make(dataclasses.replace(SMALL, depth=depth))
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    for index, block in enumerate(model.blocks, start=1):

        def remember(_, given, output, index=index):
            inputs[index], outputs[index] = given[0], output

        block.register_forward_hook(remember)
    model(*windows(SMALL))
    torch.testing.assert_close(inputs[2], outputs[1])
    torch.testing.assert_close(inputs[3], outputs[2])
    torch.testing.assert_close(inputs[4], outputs[3] + outputs[2])
    torch.testing.assert_close(inputs[5], outputs[4] + outputs[1])


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("feature", [True, False])
def test_attention_equals_its_formula_with_and_without_gradients(feature, is_fused, monkeypatch):
    monkeypatch.setattr(intra_module, "_fused_is_faster", lambda _: is_fused)
    torch.manual_seed(0)
    attention = Attention(32, 4, feature=feature, value_mlp=False).double()
    x = torch.rand(2, 9, 32, dtype=torch.float64, requires_grad=True)
    heads = [part(x).chunk(4, dim=-1) for part in (attention.query, attention.key, attention.value)]
    mixed = [torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v for q, k, v in zip(*heads, strict=True)]
    expected = attention.proj(torch.cat(mixed, -1))
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as kernel:
        found = attention(x)
    assert kernel.called == is_fused
    torch.testing.assert_close(found, expected)
    wanted = torch.rand_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, wanted), torch.autograd.grad(expected, x, wanted))
    with torch.no_grad():
        torch.testing.assert_close(attention(x), expected)


def test_large_grids_attend_with_the_fused_kernel():
    assert _fused_is_faster(torch.empty(1, 2, MANY_TOKENS, 8))
    assert not _fused_is_faster(torch.empty(1, 2, MANY_TOKENS - 1, 8))
    elsewhere = torch.empty(1, 2, MANY_TOKENS, 8, device="meta", dtype=torch.bfloat16)
    assert _fused_is_faster(elsewhere)
    with torch.no_grad():
        assert not _fused_is_faster(elsewhere[:, :, 1:])
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):  # as while a graph is traced
        assert not _fused_is_faster(torch.empty(1, 2, MANY_TOKENS, 8))


@pytest.mark.parametrize("name", PRESETS)
def test_a_network_without_weights_loads_no_compiler(name):
    """A detector is built so, then gets its weights; torch would load its compiler to draw normal numbers for it."""
    code = ("import sys, torch; from intra.config import preset; from intra.models import build\n"
            f"with torch.device('meta'): build(preset({name!r}).model)\n"
            "print([name for name in ('sympy', 'torch._dynamo') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_feature_attention_has_the_papers_widths():
    attention = Attention(512, 8, feature=True, value_mlp=False)
    assert [layer.out_features for layer in attention.query if isinstance(layer, torch.nn.Linear)] == [1024, 256]
    assert attention.value.out_features == 512


def test_the_last_block_computes_for_hidden_tokens_alone_what_it_would_for_all():
    torch.manual_seed(0)
    network = build(SMALL_LATTICE).double()
    tokens = torch.rand(3, SMALL_LATTICE.grid[0] * SMALL_LATTICE.grid[1], SMALL_LATTICE.embed_dim, dtype=torch.float64)
    places = torch.tensor([0, 5, 6, tokens.shape[1] + 2])
    seen = []
    network.blocks[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    torch.testing.assert_close(network.encode(tokens, places), network.encode(tokens).flatten(0, 1)[places])
    assert seen == [4, 3]  # tokens in a row, then windows of them


@pytest.mark.parametrize("count", [1, 3, 64, 65])
def test_in_training_the_last_block_meets_few_shapes_and_learns_the_same(count: int):
    torch.manual_seed(0)
    network = build(SMALL_LATTICE).double()
    tokens = SMALL_LATTICE.grid[0] * SMALL_LATTICE.grid[1]
    windows = 1 + count // tokens
    patch_dim = SMALL_LATTICE.channels * SMALL_LATTICE.patch_size**2
    patches = torch.rand(windows, tokens, patch_dim, dtype=torch.float64)
    positions = torch.arange(tokens).expand(windows, tokens)
    hidden = (torch.randperm(windows * tokens) < count).reshape(windows, tokens)
    seen, found = [], []
    network.blocks[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    for training in (True, False):
        network.train(training).zero_grad()
        inpainted = network(patches, positions, hidden)
        inpainted.square().sum().backward()
        found.append([inpainted, *(parameter.grad for parameter in network.parameters())])
    assert seen == [64 if count <= 64 else 128, count]
    for in_training, as_many in zip(*found, strict=True):
        torch.testing.assert_close(in_training, as_many)


@pytest.mark.parametrize("config", [SMALL, SMALL_LATTICE], ids=["mean", "token"])
def test_one_batch_is_overfitted(config):
    model = make(config)
    batch = windows(config, count=3, num_hidden=1)
    target = batch[0][batch[2]]
    losses = descend(model, lambda: F.mse_loss(model(*batch), target), steps=150, rate=2e-3)
    assert losses[-1] < 1e-3 < losses[0]


def test_inpainting_starts_from_the_mean_image():
    """Close to it before the first step, at every position, and each position's patch goes on learning."""
    config = ModelConfig(grid=(3, 4), channels=1, patch_size=4, window_size=None, embed_dim=16, depth=2, num_heads=2,
                         readout="token", mean_start=True)
    torch.manual_seed(0)
    network = build(config)
    mean = torch.rand(12, 16)
    network.start_from(mean)
    hidden = torch.zeros(2, 12, dtype=torch.bool)
    hidden[0, [1, 7]] = hidden[1, 11] = True
    inpainted = network(torch.rand(2, 12, 16), torch.arange(12).expand(2, -1), hidden)
    torch.testing.assert_close(inpainted, mean[[1, 7, 11]], atol=0.05, rtol=0)
    inpainted.square().sum().backward()
    moved = network.mean_patches.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [1, 7, 11]


def test_without_a_mean_start_the_network_is_the_papers():
    assert build(ModelConfig(grid=(7, 7), embed_dim=16, depth=2, num_heads=2)).mean_patches is None
