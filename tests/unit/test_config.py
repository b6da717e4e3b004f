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
    ({"model.embed_dim": "100"}, "multiple of 12"),
    ({"model.readout": "mean"}, "hidden_fraction=none"),
    ({"scoring.blur_size": "4"}, "odd"),
    ({"scoring.false_reject_rate": "1.5"}, "between 0 and 1"),
    ({"train.hidden_fraction": "0.5,0.2"}, "smaller one first"),
    ({"scoring.deviation": "none"}, "spread needs"),
])  # fmt: skip
def test_values_out_of_range_are_refused(settings, said):
    with pytest.raises(InTraError, match=said):
        preset("fast").with_settings(settings)


@pytest.mark.parametrize(("settings", "said"), [
    ({"model.window_size": "99"}, "grid has 16x16"),
    ({"scoring.scales": "2,128"}, "leaves less than 3 px"),
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
