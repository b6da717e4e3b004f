"""Settings: presets, text from the command line, every mistake named at once."""

import json

import pytest

from intra.config import PRESETS, Config, preset
from intra.errors import InTraError


def test_the_preset_paper_is_the_papers():
    paper = preset("paper")
    model, train, scoring = paper.model, paper.train, paper.scoring
    assert (model.patch_size, model.window_size, model.depth, model.embed_dim, model.num_heads) == (16, 7, 13, 512, 8)
    assert (model.attention, model.long_residuals, model.readout) == ("mfsa", True, "mean")
    assert (train.windows_per_image, train.batch_size, train.learning_rate, train.patience) == (600, 256, 1e-4, 50)
    assert (train.optimizer, train.gms_weight, train.ssim_weight, train.max_epochs) == ("adam", 0.01, 0.01, 200)
    assert (paper.data.validation_fraction, paper.data.max_validation_images) == (0.1, 20)
    assert (scoring.deviation, scoring.reference, scoring.spread) == ("squared", "training", False)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    assert Config.from_dict(json.loads(json.dumps(preset(name).to_dict()))) == preset(name)


def test_the_baselines_are_their_papers():
    l2, ssim, riad = (preset(name) for name in ("autoencoder_l2", "autoencoder_ssim", "riad"))
    assert l2.model == ssim.model
    assert (l2.model.network, l2.model.latent_dim) == ("autoencoder", 100)
    for config, weights in ((l2, (1, 0, 0)), (ssim, (0, 0, 1)), (riad, (1, 1, 1))):
        train = config.train
        assert (train.l2_weight, train.gms_weight, train.ssim_weight) == weights
        assert (train.optimizer, train.schedule, config.scoring.deviation) == ("adam", "constant", "none")
        assert config.data == preset("fast").data
    assert (l2.train.learning_rate, l2.train.weight_decay) == (2e-4, 1e-5)
    assert (l2.scoring.difference, ssim.scoring.difference, riad.scoring.difference) == ("squared", "ssim", "gms")
    assert (riad.model.cell_sizes, riad.model.num_cell_sets, riad.train.learning_rate) == ((2, 4, 8, 16), 3, 1e-4)
    assert riad.scoring.scales == riad.train.gms_scales == (1, 2, 4, 8)


def test_settings_of_an_older_checkpoint_or_cell_are_read():
    values = preset("fast").to_dict()
    for part, names in (("model", ("network", "latent_dim", "base_width", "cell_sizes", "num_cell_sets")),
                        ("train", ("l2_weight", "gms_scales")), ("scoring", ("difference",))):
        for name in names:
            del values[part][name]
    assert Config.from_dict(values) == preset("fast")
    del values["model"]["segmenter_width"], values["model"]["conditional_positions"]
    assert (Config.from_dict(values).model.segmenter_width, Config.from_dict(values).model.conditional_positions) == (
        0, False)


@pytest.mark.parametrize(("key", "text", "value"), [
    ("train.batch_size", "16", 16),
    ("train.learning_rate", "3e-4", 3e-4),
    ("train.hidden_fraction", "0.1,0.3", (0.1, 0.3)),
    ("train.patience", "none", None),
    ("train.flips", "off", "off"),
    ("model.window_size", "none", None),
    ("model.value_mlp", "on", True),
    ("model.long_residuals", "false", False),
    ("scoring.scales", "1,2,4", (1, 2, 4)),
    ("data.image_size", "256x128", (256, 128)),
    ("data.image_size", "auto", "auto"),
])  # fmt: skip
def test_settings_from_text(key, text, value):
    part, name = key.split(".")
    assert getattr(getattr(preset("fast").with_settings({key: text}), part), name) == value


def test_every_wrong_setting_is_named_at_once():
    with pytest.raises(InTraError) as error:
        preset("fast").with_settings({"model.dept": "3", "train.batch_size": "many", "scoring.deviation": "cubed"})
    said = str(error.value)
    assert "did you mean 'model.depth'" in said
    assert "train.batch_size='many' is not a whole number" in said
    assert "squared, clipped, signed or none" in said


@pytest.mark.parametrize(("settings", "said"), [
    ({"model.depth": "0", "train.batch_size": "-1"}, "model.depth is 0.*train.batch_size is -1"),
    ({"model.mlp_ratio": "inf"}, "not a number"),
    ({"train.gradient_clip": "nan"}, "not a number"),
    ({"model.grid": "4x4"}, "unknown setting"),
    ({"model.embed_dim": "100"}, "multiple of 6"),
    ({"model.embed_dim": "100", "model.attention": "mfsa"}, "multiple of 12"),
    ({"model.readout": "mean"}, "hidden_fraction=none"),
    ({"scoring.blur_size": "4"}, "odd"),
    ({"scoring.false_reject_rate": "1.5"}, "between 0 and 1"),
    ({"train.hidden_fraction": "0.5,0.2"}, "smaller one first"),
    ({"scoring.deviation": "none"}, "spread needs"),
    ({"model.latent_dim": "0", "model.base_width": "0"}, "latent_dim is 0.*base_width is 0"),
    ({"model.cell_sizes": "2,0", "model.num_cell_sets": "1"}, "num_cell_sets is 1.*cell_sizes is"),
    ({"model.network": "riad", "model.window_size": "7"}, "takes whole images"),
    ({"model.network": "unet"}, "intra, autoencoder or riad"),
    ({"train.l2_weight": "-1"}, "l2_weight is -1.0; it must not be negative"),
    ({"train.l2_weight": "0", "train.gms_weight": "0", "train.ssim_weight": "0"}, "nothing would be learnt"),
    ({"train.gms_scales": "0"}, "at least one factor"),
])  # fmt: skip
def test_values_out_of_range_are_refused(settings, said):
    with pytest.raises(InTraError, match=said):
        preset("fast").with_settings(settings)


@pytest.mark.parametrize(("settings", "said"), [
    ({"model.window_size": "99", "model.segmenter_width": "0"}, "grid has 16x16"),
    ({"scoring.scales": "2,128"}, "leaves less than 3 px"),
    ({"train.gms_scales": "1,8"}, "leaves less than 3 of the 16 px"),
])  # fmt: skip
def test_what_does_not_fit_the_image_is_refused_once_its_size_is_known(settings, said):
    with pytest.raises(InTraError, match=said):
        preset("fast").with_settings(settings).check_grid()


@pytest.mark.parametrize(("part", "name", "value"), [
    ("model", "wings", 2), ("model", "depth", "six"), ("model", "grid", [16, 16, 16]), ("model", "readout", "foo"),
    ("model", "mlp_ratio", float("nan")), ("train", "batch_size", True), ("scoring", "scales", [1.5]),
    ("scoring", "deviation", "foo"), ("scoring", "lattice", 10**30), ("scoring", "blur_size", 10**12 + 1),
])  # fmt: skip
def test_wrong_names_and_types_in_a_file_are_refused(part, name, value):
    values = preset("fast").to_dict()
    values[part][name] = value
    with pytest.raises(InTraError, match=name):
        Config.from_dict(values)


@pytest.mark.parametrize("values", [None, [], {"model": None}, {"model": [1]}])
def test_settings_that_are_no_table_are_refused(values):
    with pytest.raises(InTraError, match="table"):
        Config.from_dict(values)


def test_unknown_presets_get_the_nearest_name():
    with pytest.raises(InTraError, match="did you mean 'paper'"):
        preset("papper")
