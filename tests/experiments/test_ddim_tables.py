"""The tables of DDIM: a whole study at tiny size, what it keeps, and what its page says of the numbers."""

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from argparse import Namespace

import pytest
import torch

from experiments import ddim_tables, ddim_tables_cells, ddim_tables_page, small_models
from ldm.data import to_uint8
from ldm.diffusion import LossConfig
from ldm.evaluation.features import pixel_features

CPU = torch.device("cpu")
# So few that eight pictures are enough for a covariance.
FEW = {"few": lambda images: pixel_features(images)[:, :3], "tone": lambda images: images.mean((1, 2, 3))[:, None]}


@pytest.fixture(scope="module")
def data():
    """32 digits of two kinds, 24 of them for training; states that need no text encoder."""
    whole = ddim_tables.read_data("digits", 8, grey=True, max_length=4)
    chosen = [place for place in range(len(whole.images)) if ddim_tables.digit_of(whole.captions[place][0]) < 2][:32]
    return small_models.Data(
        ids=tuple(whole.ids[place] for place in chosen),
        images=whole.images[chosen],
        captions=tuple(whole.captions[place] for place in chosen),
        training=24,
        states=whole.states,
    )


def recipe(steps=4, **changes):
    train = dataclasses.replace(ddim_tables.DIGITS.recipe.train, max_steps=steps, batch_size=8, warmup_steps=1)
    unet = dataclasses.replace(ddim_tables.DIGITS.recipe.unet, block_out_channels=(8, 8), norm_num_groups=4)
    return dataclasses.replace(ddim_tables.DIGITS.recipe, unet=unet, train=train, **changes)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    unet = small_models.trained_model(recipe(), data, folder, CPU)
    return ddim_tables_cells.Model(data, unet, "epsilon", folder, CPU)


def test_data_are_grey_and_normalised(data):
    assert data.images.shape == (32, 1, 8, 8)
    latents = data.codec().sample_latents(data.images[:24])
    assert float(latents.mean()) == pytest.approx(0, abs=1e-5)
    assert float(latents.std()) == pytest.approx(1, abs=1e-3)
    assert len(data.held_out) == 8
    images, captions = data.draw_captions(0, range(20))
    assert all(caption in data.captions[image] for image, caption in zip(images, captions, strict=True))
    assert (images, captions) != data.draw_captions(1, range(20))
    assert data.draw_captions(0, [7])[1] == captions[7:8]


def test_digits_are_read_from_every_phrasing():
    source = ddim_tables.read_data("digits", 8, grey=True, max_length=4)
    for captions in source.captions[:20]:
        assert len({ddim_tables.digit_of(caption) for caption in captions}) == 1


def test_an_interrupted_training_ends_in_the_same_weights(data, tmp_path, monkeypatch):
    plan = recipe(steps=5, save_every=2)
    whole = small_models.trained_model(plan, data, tmp_path / "whole", CPU)

    class Killed(Exception):
        pass

    def killed_after_4(config, step):
        if step == 4:
            raise Killed
        return rate(config, step)

    rate = small_models.learning_rate
    monkeypatch.setattr(small_models, "learning_rate", killed_after_4)
    with pytest.raises(Killed):
        small_models.trained_model(plan, data, tmp_path / "killed", CPU)
    monkeypatch.setattr(small_models, "learning_rate", lambda config, step: rate(config, step) if step >= 4 else 1 / 0)
    resumed = small_models.trained_model(plan, data, tmp_path / "killed", CPU)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert any(value.abs().sum() > 0 for name, value in resumed.state_dict().items() if "conv_out" in name)
    assert not (tmp_path / "killed" / "state.safetensors").exists()


def test_prediction_and_loss_reach_the_training(data, tmp_path):
    plans = {
        "epsilon": recipe(),
        "mean": recipe(prediction_type="posterior_mean"),
        "vlb": recipe(loss=LossConfig(weighting="vlb")),
    }
    weights = {
        name: small_models.trained_model(plan, data, tmp_path / name, CPU).unet.conv_out.weight
        for name, plan in plans.items()
    }
    losses = {name: json.loads((tmp_path / name / "training.json").read_text())["loss"] for name in plans}
    assert 0.5 < losses["epsilon"] < 1.5  # the mean square of noise
    assert losses["vlb"] > 3  # in bits, times T
    assert not torch.equal(weights["epsilon"], weights["mean"])
    assert not torch.equal(weights["epsilon"], weights["vlb"])


def test_a_picture_depends_on_its_place_alone(model):
    together = ddim_tables_cells.draw_piece(model, "leading", 3, "1", 0, [4, 5])
    assert torch.equal(ddim_tables_cells.draw_piece(model, "leading", 3, "1", 0, [5]), together[1:])
    assert together.dtype == torch.uint8
    assert not torch.equal(ddim_tables_cells.draw_piece(model, "leading", 3, "1", 1, [5]), together[1:])
    for variant in ("0", "sigma_hat"):
        assert not torch.equal(ddim_tables_cells.draw_piece(model, "leading", 3, variant, 0, [4, 5]), together)


def test_a_model_of_the_mean_draws_as_the_same_model_of_noise(data, model):
    """μ̃ = a x_0 + b x_t of what the network says of the noise, given to the conversion, gives back that noise."""
    schedule = small_models.NoiseSchedule.from_config(small_models.SCHEDULE)
    a, b = schedule.posterior_mean_coefficients

    def mean(x_t, timesteps, condition):
        t = int(timesteps[0])
        alpha, sigma = schedule.alpha_sigma(t)
        original = (x_t.double() - sigma * model.unet(x_t, timesteps, condition).double()) / alpha
        return a[t] * original + b[t] * x_t.double()

    converted = ddim_tables_cells.Model(data, mean, "posterior_mean", model.folder, CPU)
    captions, x_t = [data.captions[0][0]] * 2, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (1, 500, 999):
        expected, found = model.denoise(captions)(x_t, t), converted.denoise(captions)(x_t, t)
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_pieces_are_kept_and_added_to(model, monkeypatch):
    monkeypatch.setattr(ddim_tables_cells, "PIECE", 3)
    few, _ = ddim_tables_cells.pictures(model, "trailing", 2, "0.5", 0, 3)
    more, seconds = ddim_tables_cells.pictures(model, "trailing", 2, "0.5", 0, 5)
    assert torch.equal(more[:3], few) and len(more) == 5 and seconds > 0
    monkeypatch.setattr(ddim_tables_cells, "draw_piece", None)  # nothing is drawn twice
    assert torch.equal(ddim_tables_cells.pictures(model, "trailing", 2, "0.5", 0, 5)[0], more)


def test_more_steps_reconstruct_better(data, tmp_path):
    unet = small_models.make_unet(recipe(), data).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in unet.parameters():  # a new network predicts zero, which any grid takes back
        torch.nn.init.normal_(parameter, std=0.1)
    model = ddim_tables_cells.Model(data, unet, "epsilon", tmp_path, CPU)
    errors = {steps: ddim_tables_cells.reconstruction_errors(model, steps, 8) for steps in (20, 200)}
    assert len(errors[20]) == 8
    assert 0 < sum(errors[200]) < 0.3 * sum(errors[20])
    assert ddim_tables_cells.reconstruction_errors(model, 20, 8) == errors[20]


def test_consistency_compares_with_the_same_start_and_the_next_of_a_kind():
    generator = torch.Generator().manual_seed(0)
    long = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1
    kinds = ["a", "b", "a", "b"]
    same = ddim_tables_cells.consistency(to_uint8(long), to_uint8(long), kinds)
    assert same["mse_same"] == 0 and same["found"] == 1
    assert same["correlation_same"] == pytest.approx(1)
    assert abs(same["correlation_other"]) < 0.5 < same["correlation_same"]
    # The next of a kind: 0 → 2 → 1 → 3 → 0.
    next_one = ddim_tables_cells.consistency(to_uint8(long), to_uint8(long[[3, 2, 0, 1]]), kinds)
    assert next_one["mse_other"] == 0 and next_one["found"] == 0
    assert next_one["mse_same"] == pytest.approx(same["mse_other"])


@pytest.fixture(scope="module")
def study(data, tmp_path_factory):
    """A whole run on two grids with eight pictures a cell, twice: the second time everything is there already."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("study")
    patch.setattr(ddim_tables, "STEPS", (2, 4))
    patch.setattr(ddim_tables, "INVERSION_STEPS", (2, 4))
    patch.setattr(ddim_tables, "SHEET_STEPS", (2,))
    domain = dataclasses.replace(
        ddim_tables.DIGITS,
        read=lambda: data,
        recipe=recipe(2),
        features=lambda _: FEW,
    )
    patch.setitem(ddim_tables.DOMAINS, "digits", domain)
    arguments = Namespace(
        only=["digits", "ablation"], samples=8, seeds=2, work=folder / "work", output=folder, device="cpu"
    )
    ddim_tables.run(arguments)
    drawn_again = ddim_tables_cells.draw_piece
    patch.setattr(ddim_tables_cells, "draw_piece", None)
    (folder / "ddim_tables.md").write_text((folder / "ddim_tables.md").read_text() + "\n## Reading\n\nBy a person.\n")
    ddim_tables.run(arguments)
    patch.setattr(ddim_tables_cells, "draw_piece", drawn_again)
    yield folder
    patch.undo()


def test_a_study_writes_every_cell_and_keeps_what_a_person_wrote(study):
    results = json.loads((study / "ddim_tables.json").read_text())["digits"]
    leading, trailing = (results["table_1"][grid] for grid in ("leading", "trailing"))
    assert set(leading) == set(trailing) == {"2", "4"}
    assert leading["2"] != trailing["2"]
    for row in (*leading.values(), *trailing.values(), results["ablation"]):
        assert all(len(cells) == 2 and all(math.isfinite(cell["few"]) for cell in cells) for cells in row.values())
    assert set(leading["4"]) == set(ddim_tables_cells.VARIANTS)
    assert results["ablation"]["epsilon-simple"] == leading["4"]["1"]
    assert set(results["same_start"]) == {"2"}
    assert [len(errors) for errors in results["table_2"].values()] == [8, 8]
    assert len(set(results["floor"]["few"])) == 10 and min(results["floor"]["few"]) > 0
    text = (study / "ddim_tables.md").read_text()
    assert "    python -m experiments.ddim_tables --only digits ablation --samples 8 --seeds 2\n\n" in text
    assert text.endswith("## Reading\n\nBy a person.\n")
    assert (study / "ddim_tables-digits.png").stat().st_size > 1000
    svg = ElementTree.fromstring((study / "ddim_tables-digits-leading.svg").read_text())
    lines = [element for element in svg.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 5 and all(len(line.attrib["points"].split()) == 2 for line in lines)


def test_pieces_of_another_recipe_are_refused(study, monkeypatch):
    domain = dataclasses.replace(ddim_tables.DOMAINS["digits"], recipe=recipe(3))
    with pytest.raises(ValueError, match="another recipe"):
        ddim_tables.Study(domain, study / "work", samples=8, seeds=2, device="cpu")


def test_the_estimate_counts_what_a_study_asks_of_the_network(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ddim_tables, "STEPS", (2, 4))
    monkeypatch.setattr(ddim_tables, "INVERSION_STEPS", (2,))
    monkeypatch.setattr(ddim_tables, "INVERTED", 8)
    domain = dataclasses.replace(
        ddim_tables.DIGITS,
        read=lambda: data,
        recipe=recipe(2),
        long_variants=("0",),
        features=lambda _: FEW,
    )
    assert re.fullmatch(
        r"digits: training \d+\.\d h, drawing and inverting \d+\.\d h", ddim_tables.estimate(domain, 9, 2, CPU)
    )
    trained, asked = ddim_tables.trained_model, []

    def counted(*arguments):
        unet = trained(*arguments)
        unet.register_forward_hook(lambda module, given, out: asked.append(len(out)))
        return unet

    monkeypatch.setattr(ddim_tables, "trained_model", counted)
    for _ in ddim_tables.Study(domain, tmp_path, samples=8, seeds=2, device="cpu").parts({}):
        pass
    # The longest row is drawn once for both grids where S = T, as it is in earnest.
    assert sum(asked) == ddim_tables.evaluations(domain, 8, 2) + 8 * 2 * 4


def cells(**means):
    return {name: [{"f": mean * 0.95}, {"f": mean * 1.05}] for name, mean in means.items()}


AS_IN_THE_PAPER = {
    "5": cells(**{"0": 10.0, "0.2": 11.0, "0.5": 12.0, "1": 15.0, "sigma_hat": 90.0}),
    "1000": cells(**{"0": 4.0, "0.2": 4.1, "0.5": 4.2, "1": 4.5, "sigma_hat": 4.4}),
}


def test_claims_are_read_off_the_numbers():
    said = ddim_tables_page.claims_of_table_1(AS_IN_THE_PAPER, "f")
    assert [": holds." in claim for claim in said] == [True, True, True]
    turned = {"5": AS_IN_THE_PAPER["1000"], "1000": AS_IN_THE_PAPER["5"]}
    said = ddim_tables_page.claims_of_table_1(turned, "f")
    assert [": holds." in claim for claim in said] == [True, False, False]
    assert "they meet: does not apply." in said[2] and said[2].endswith("so that they were not apart.")
    beaten = {"5": cells(**{"0": 10.0, "0.5": 9.0, "sigma_hat": 30.0}), "1000": AS_IN_THE_PAPER["1000"]}
    assert "does not hold" in ddim_tables_page.claims_of_table_1(beaten, "f")[0]
    beaten["5"]["0.5"] = [{"f": 9.8}, {"f": 9.9}]  # lower than 9.5 and 10.5 on average, but not seed by seed
    said = ddim_tables_page.claims_of_table_1(beaten, "f")[0]
    assert "not decided" in said and "S = 5: lowest is η = 0.5 (-0.150 ±" in said
    assert ": holds." in ddim_tables_page.claim_of_table_2({"10": [0.1, 0.3], "5": [0.4, 0.5], "100": [0.1, 0.1]})
    assert "does not hold" in ddim_tables_page.claim_of_table_2({"10": [0.1, 0.3], "5": [0.1, 0.1]})
    ablation = cells(**{"mean-L": 20.0, "epsilon-L": 14.0, "epsilon-simple": 4.0})
    assert ": holds." in ddim_tables_page.claim_of_ablation(ablation, "f")
    assert "does not hold" in ddim_tables_page.claim_of_ablation({**ablation, **cells(**{"mean-L": 1.0})}, "f")


def test_numbers_are_shown_with_what_is_known_of_them():
    assert ddim_tables_page.shown([12.345]) == "12.3"
    assert ddim_tables_page.shown([1.0, 3.0]) == "2.00 ± 12.7"
    assert ddim_tables_page.shown([0.0, 0.0]) == "0 ± 0"
    assert ddim_tables_page.shown([1.23e-6]) == "1.23e-06"


def test_a_network_of_patches_learns_the_same_images(data, tmp_path):
    plan = recipe(steps=2, patch=2)
    unet = small_models.trained_model(plan, data, tmp_path, CPU)
    assert unet.unet.config.in_channels == 4 and unet.unet.config.sample_size == 4
    again = small_models.trained_model(plan, data, tmp_path, CPU)  # from the folder
    x, condition = torch.randn(2, 1, 8, 8), data.condition([data.captions[0][0]] * 2)
    assert torch.equal(unet(x, torch.tensor(5), condition), again(x, torch.tensor(5), condition))
    # A network that gives back its input shows that pixels return to their places.
    unet.unet = torch.nn.Module()
    unet.unet.forward = lambda folded, timesteps, condition: folded
    assert torch.equal(unet(x, torch.tensor(5), condition), x)


def test_a_recipe_in_half_precision_trains_in_it(data, tmp_path):
    plan = recipe(steps=3)
    half = dataclasses.replace(plan, train=dataclasses.replace(plan.train, mixed_precision="bf16"))
    whole, halved = (
        small_models.trained_model(made, data, tmp_path / made.train.mixed_precision, CPU).state_dict()
        for made in (plan, half)
    )
    assert all(value.dtype == torch.float32 for value in halved.values())
    assert any(not torch.equal(whole[name], halved[name]) for name in whole)
