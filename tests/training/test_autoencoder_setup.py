"""First-stage training: which gradient reaches which network, the adaptive weight, what is resumed, and start_from."""

import json
import shutil

import numpy as np
import pytest
import torch

from ldm import hub
from ldm.config import AutoencoderLossConfig
from ldm.models import (
    AutoencoderConfig,
    AutoencoderKL,
    DiscriminatorConfig,
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    kl_divergence,
)
from ldm.models.efficientnet import perceptual_distance
from ldm.training.autoencoder_setup import DELTA, AdversarialLoss, autoencoder_loss
from ldm.training.launch import HOOKS
from ldm.training.run import Hooks
from ldm.training.setup import load_first_stage
from tests import tiny
from tests.training.runs import autoencoder_settings, captioned_folder, digests, metrics, run_autoencoder
from tests.training.test_resume import broken_off, torchrun
from tools.torture_resume import differences, evidence

SIDE = 16
ADVERSARIAL = [
    "loss.perceptual_weight=0.5", "loss.adversarial_weight=0.5", "loss.adversarial_start=1", "train.max_steps=4",
    "discriminator={channels: 8, levels: 2, norm_num_groups: 4}",
]  # fmt: skip


@pytest.fixture(scope="module")
def perceptual():
    return perceptual_distance()


class OneProcess:
    """What `AdversarialLoss.update_weight` needs of accelerate."""

    num_processes = 1


class OneOfTwo:
    """The same of a process that has another beside it, whose tensor is known."""

    num_processes = 2

    def __init__(self, other):
        self.other = other

    def reduce(self, tensor, how):
        assert how == "mean"
        return (tensor + self.other) / 2


class FirstStage:
    """Both networks with their losses, at tiny width."""

    def __init__(self, perceptual=None, **loss):
        torch.manual_seed(0)
        self.autoencoder = AutoencoderKL(AutoencoderConfig(**tiny.VAE))
        self.discriminator = PatchDiscriminator(DiscriminatorConfig(channels=8, levels=2, norm_num_groups=4))
        self.loss = AutoencoderLossConfig(kl_weight=0.1, adversarial_weight=0.7, **loss)
        self.perceptual = perceptual
        self.adversary = AdversarialLoss(self.discriminator, self.discriminator, self.loss)

    @property
    def last_layer(self):
        return self.autoencoder.decoder.conv_out.weight

    def losses(self, images, noise):
        reconstruction, moments = self.autoencoder(images, noise)
        return autoencoder_loss(
            images, reconstruction, moments, loss=self.loss, perceptual=self.perceptual, adversary=self.adversary,
            last_layer=self.last_layer,
        )  # fmt: skip

    def terms(self, images, noise):
        """(distance, regulariser, generator's loss, discriminator's loss), means, by the formulas of the papers."""
        reconstruction, moments = self.autoencoder(images, noise)
        error = images - reconstruction
        distance = error.abs().mean() if self.loss.reconstruction == "l1" else error.square().mean()
        if self.perceptual is not None:
            distance = distance + self.loss.perceptual_weight * self.perceptual(images, reconstruction).mean()
        regulariser = self.loss.kl_weight * kl_divergence(moments).mean() / images[0].numel()
        fooled = generator_loss(self.discriminator(reconstruction), self.loss.adversarial).mean()
        real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
        return distance, regulariser, fooled, discriminator_loss(real, fake, self.loss.adversarial).mean()


def pictures(count=4):
    return torch.rand(count, 3, SIDE, SIDE) * 2 - 1, torch.randn(count, 4, SIDE // 2, SIDE // 2)


def gradients(loss, network):
    return dict(
        zip(
            [name for name, _ in network.named_parameters()],
            torch.autograd.grad(loss, list(network.parameters()), retain_graph=True),
            strict=True,
        )
    )


@pytest.mark.parametrize(
    "loss",
    [
        {"perceptual_weight": 0.5},
        {"reconstruction": "l2", "adversarial": "non_saturating"},
    ],
)
def test_each_network_gets_the_gradient_of_its_own_loss_alone(loss, perceptual):
    stage = FirstStage(perceptual if "perceptual_weight" in loss else None, **loss)
    stage.adversary.weight = 0.3
    images, noise = pictures()
    for objective in stage.losses(images, noise).objectives:
        objective.backward()
    distance, regulariser, fooled, judged = stage.terms(images, noise)
    expected = {
        stage.autoencoder: gradients(distance + regulariser + 0.7 * 0.3 * fooled, stage.autoencoder),
        stage.discriminator: gradients(judged, stage.discriminator),
    }
    for network, wanted in expected.items():
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=2e-3, atol=2e-6, msg=lambda m, n=name: n + m)
    # The terms that are not those of the network would be seen.
    mixed = gradients(fooled, stage.discriminator)
    assert max(float(value.abs().max()) for value in mixed.values()) > 1e-3
    assert max(float(value.abs().max()) for value in gradients(fooled, stage.autoencoder).values()) > 1e-3


def test_what_is_logged_is_each_term_before_its_weight(perceptual):
    stage = FirstStage(perceptual, perceptual_weight=0.5)
    stage.adversary.weight = 0.3
    images, noise = pictures()
    losses = stage.losses(images, noise)
    distance, regulariser, fooled, judged = stage.terms(images, noise)
    figures = {name: float(value.detach().mean()) for name, value in losses.figures.items()}
    assert float(losses.values.detach().mean()) == pytest.approx(float(distance + regulariser), rel=1e-5)
    assert figures["loss_reconstruction"] + 0.5 * figures["loss_perceptual"] == pytest.approx(float(distance), rel=1e-5)
    assert 0.1 * figures["loss_kl"] == pytest.approx(float(regulariser), rel=1e-5)
    assert figures["loss_generator"] == pytest.approx(float(fooled), rel=1e-4)
    assert figures["loss_discriminator"] == pytest.approx(float(judged), rel=1e-4)
    assert figures["adversarial_weight"] == pytest.approx(0.7 * 0.3)


def ratio(stage, images, noise):
    """VQGAN, Eq. 7."""
    distance, _, fooled, _ = stage.terms(images, noise)
    (one,) = torch.autograd.grad(distance, stage.last_layer, retain_graph=True)
    (other,) = torch.autograd.grad(fooled, stage.last_layer)
    return float(one.norm() / (other.norm() + DELTA))


def test_adaptive_weight_is_the_gradient_ratio_of_the_previous_step(perceptual):
    stage = FirstStage(perceptual, perceptual_weight=0.5)
    images, noise = pictures()
    first = stage.losses(images, noise)
    assert float(first.figures["adversarial_weight"]) == 0, "the first step has none before it"
    stage.adversary.update_weight(OneProcess(), stepped=True)
    expected = ratio(stage, images, noise)
    assert stage.adversary.weight == pytest.approx(expected, rel=1e-4)
    assert 0.01 < expected < 100
    assert float(stage.losses(images, noise).figures["adversarial_weight"]) == pytest.approx(0.7 * expected, rel=1e-4)


def test_adaptive_weight_is_bounded_and_unchanged_by_skipped_steps():
    images, noise = pictures()
    stage = FirstStage(adaptive_weight_limit=0.01)
    stage.losses(images, noise)
    stage.adversary.update_weight(OneProcess(), stepped=True)
    assert stage.adversary.weight == 0.01
    stage.adversary.weight = 0.005
    stage.losses(images, noise)
    stage.adversary.update_weight(OneProcess(), stepped=False)
    stage.adversary.update_weight(OneProcess(), stepped=True)  # nothing of the skipped step is left
    assert stage.adversary.weight == 0.005
    stage.losses(images, noise)
    stage.adversary.discard_gradients()
    stage.adversary.update_weight(OneProcess(), stepped=True)
    assert stage.adversary.weight == 0.005


def test_the_adaptive_weight_does_not_depend_on_how_a_batch_is_cut():
    stage, images, noise = FirstStage(), *pictures(4)
    images[2:] *= 0.1
    expected = ratio(stage, images, noise)
    halves = [ratio(stage, images[part], noise[part]) for part in (slice(2), slice(2, 4))]
    assert abs(sum(halves) / 2 / expected - 1) > 0.01, "the mean of ratios would pass too"

    for part in (slice(2), slice(2, 4)):  # micro-batches of a process
        stage.losses(images[part], noise[part])
    stage.adversary.update_weight(OneProcess(), stepped=True)
    assert stage.adversary.weight == pytest.approx(expected, rel=1e-4)

    one, two = AdversarialLoss(stage.discriminator, stage.discriminator, stage.loss), FirstStage()  # two processes
    two.losses(images[2:], noise[2:])
    (sent,) = two.adversary._last_layer_grads
    stage.adversary = one
    stage.losses(images[:2], noise[:2])
    one.update_weight(OneOfTwo(sent), stepped=True)
    assert one.weight == pytest.approx(expected, rel=1e-4)


# ---- runs


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory):
    return captioned_folder(tmp_path_factory.mktemp("pictures") / "data", 40)


@pytest.fixture
def train(pictures_folder):
    """A function that trains on a few pictures into a folder, by default without a plan, which takes time."""

    def run(folder, *overrides, plan=False, **more):
        hooks = HOOKS if plan else Hooks()
        return run_autoencoder(folder, *few(pictures_folder), *overrides, hooks=hooks, **more).parent

    return run


def few(folder):
    return [f"data.path={folder}", "data.held_out=0.2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory, pictures_folder):
    """A first stage of two steps on these pictures."""
    return run_autoencoder(tmp_path_factory.mktemp("start") / "run", *few(pictures_folder)).parent


def figures_of(run, *names):
    return np.array([[line[name] for name in names] for line in metrics(run) if "loss" in line])


def test_accumulation_changes_nothing_with_a_discriminator(tmp_path, train):
    train(tmp_path / "one", *ADVERSARIAL)
    train(tmp_path / "two", *ADVERSARIAL, "train.gradient_accumulation_steps=2")
    names = ("loss", "loss_perceptual", "gradient_norm")
    np.testing.assert_allclose(figures_of(tmp_path / "two", *names), figures_of(tmp_path / "one", *names), rtol=1e-4)
    for run in (tmp_path / "one", tmp_path / "two"):
        judged = [line for line in metrics(run) if "loss_discriminator" in line]
        assert [line["step"] for line in judged] == [2, 3, 4]
        assert judged[0]["adversarial_weight"] == 0 < min(line["adversarial_weight"] for line in judged[1:])
    assert_same_game(tmp_path / "two", tmp_path / "one")


def assert_same_game(run, other):
    """Both runs log the same of the discriminator, and end with the same weights."""
    names = ("loss_generator", "loss_discriminator", "adversarial_weight", "gradient_norm_discriminator")
    found, expected = ([[line[n] for n in names] for line in metrics(r) if names[0] in line] for r in (run, other))
    assert len(found) >= 3
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    last = "checkpoints/step_00000004/training"
    for name in ("model", "discriminator"):
        one, two = (hub.load_tensors(r / last / f"{name}.safetensors") for r in (run, other))
        for key, value in one.items():
            torch.testing.assert_close(value, two[key], rtol=1e-3, atol=2e-5)
    weights = [hub.read_json(r / last / "state.json")["adversarial_weight"] for r in (run, other)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one_with_a_discriminator(accumulation, tmp_path, pictures_folder, train):
    train(tmp_path / "one", *ADVERSARIAL)
    arguments = [*autoencoder_settings(tmp_path / "two"), *few(pictures_folder), *ADVERSARIAL]
    torchrun(2, [*arguments, f"train.gradient_accumulation_steps={accumulation}"], script="train_autoencoder.py")
    assert hub.read_json(tmp_path / "two/checkpoints/step_00000004/training/state.json")["processes"] == 2
    assert_same_game(tmp_path / "two", tmp_path / "one")


def test_a_checkpoint_holds_the_discriminator_without_ema(tmp_path, capsys, train):
    large = "discriminator={channels: 64, levels: 3}"
    run = train(tmp_path / "run", *ADVERSARIAL, large, "train.max_steps=2", plan=True)
    folder = run / "checkpoints" / "step_00000002" / "training"
    model, ema, judge, moments = (
        hub.load_tensors(folder / f"{name}.safetensors")
        for name in ("model", "ema", "discriminator", "discriminator_optimizer")
    )
    assert ema.keys() == model.keys()
    assert {"conv_in.weight", "norm_mid.weight", "conv_out.bias"} <= judge.keys()
    assert moments.keys() == {f"{kind}.{name}" for name in judge for kind in ("exp_avg", "exp_avg_sq", "step")}
    # What was planned: the discriminator is most of what is written.
    count = sum(value.numel() for value in judge.values())
    assert f"discriminator of {count / 1e6:.3g} M" in capsys.readouterr().out
    plan = json.loads((run / "plan.json").read_text())
    written = sum(path.stat().st_size for path in folder.parent.rglob("*.safetensors"))
    assert written > 12 * count
    assert plan["disk_bytes"] == pytest.approx(written, rel=0.1)
    assert plan["fixed_bytes"] > 16 * count


def test_a_discriminator_changes_nothing_before_its_start(tmp_path, train):
    """Not its clipping either: each gradient is clipped to the norm of its own network."""
    clipped = ["train.max_grad_norm=0.01", "train.max_steps=2", "train.learning_rate=0.01", "train.warmup_steps=1"]
    for name, weight in (("with", 0.5), ("without", 0)):
        train(tmp_path / name, *ADVERSARIAL, *clipped, f"loss.adversarial_weight={weight}")
    lines = [[line for line in metrics(tmp_path / name) if "loss" in line] for name in ("with", "without")]
    assert [line["gradient_norm"] for line in lines[0]] == pytest.approx([line["gradient_norm"] for line in lines[1]])
    assert lines[0][1]["gradient_norm_discriminator"] > 0.1
    moments = "checkpoints/step_00000002/training/optimizer.safetensors"
    one, two = (hub.load_tensors(tmp_path / name / moments) for name in ("with", "without"))
    for name in one:
        if name.startswith("exp_avg."):
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-8)
    judged = hub.load_tensors((tmp_path / "with" / moments).with_name("discriminator_optimizer.safetensors"))
    # AdamW's first average is (1 - beta1) times the gradient.
    norm = torch.cat([v.flatten() for n, v in judged.items() if n.startswith("exp_avg.")]).norm()
    assert float(norm) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_loss_of_the_discriminator_that_is_not_finite_skips_both(tmp_path, monkeypatch, capsys, train):
    calls = []

    def spoilt(real, fake, kind):
        calls.append(1)
        loss = discriminator_loss(real, fake, kind)
        return loss * float("nan") if len(calls) == trained else loss

    monkeypatch.setattr("ldm.training.autoencoder_setup.discriminator_loss", spoilt)
    trained = 2  # the discriminator's second step is the run's third
    run = train(tmp_path / "run", *ADVERSARIAL, "train.checkpoint_every=1", "train.keep_checkpoints=9")
    assert "step 3 was skipped" in (said := capsys.readouterr().out) and "loss_discriminator nan" in said
    two, three, four = (run / "checkpoints" / f"step_0000000{step}" for step in (2, 3, 4))
    assert digests(two) == digests(three)
    assert all(digests(three)[name] != value for name, value in digests(four).items())
    states = [hub.read_json(folder / "training" / "state.json") for folder in (two, three, four)]
    assert states[0]["adversarial_weight"] == states[1]["adversarial_weight"] != states[2]["adversarial_weight"]
    assert states[1]["skipped"] == {"in_all": 1, "in_a_row": 1}


def test_a_run_without_a_discriminator_is_not_resumed_with_one(tmp_path, start, train):
    shutil.copytree(start, tmp_path / "run")
    accepted = ["loss.adversarial_weight", "train.max_steps"]
    with pytest.raises(ValueError, match=r"holds no discriminator, as that run had none; start a new .* start_from"):
        train(tmp_path / "run", "loss.adversarial_weight=1", "train.max_steps=3", resume=True, accept=accepted)


# ---- going on from an autoencoder


def moments_of(folder):
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codec = load_first_stage(str(folder))
    with torch.no_grad():
        moments = codec.moments(images)
        return codec, moments, codec.decode(codec.sample_latents(moments))


@pytest.mark.parametrize("whose", ["ours", "Stable Diffusion's"])
def test_the_decoder_alone_learns_and_the_latents_stay_bit_for_bit(whose, tmp_path, start, stable_diffusion, train):
    start = start / "autoencoder" if whose == "ours" else stable_diffusion
    arguments = ["autoencoder=null", f"start_from={start}", "trained=decoder", "train.checkpoint_every=2", *ADVERSARIAL]
    run = train(tmp_path / "run", *arguments)
    (before, old, pictures_before), (after, new, pictures_after) = moments_of(start), moments_of(run / "autoencoder")
    assert torch.equal(old, new)
    assert after.fingerprint() == before.fingerprint()
    assert (after.mean, after.std) == (before.mean, before.std)
    assert after.autoencoder.config == before.autoencoder.config
    assert not torch.allclose(pictures_after, pictures_before, atol=1e-3)
    learned = hub.load_tensors(run / "checkpoints" / "step_00000004" / "training" / "model.safetensors")
    assert {name.split(".")[0] for name in learned} == {"decoder", "post_quant_conv"}
    assert [line["step"] for line in metrics(run) if "held_out_psnr" in line] == [0, 4], "it is measured before, too"
    assert not any("loss_kl" in line for line in metrics(run)), "what the encoder alone could change is no loss"

    if whose == "ours":
        two = broken_off(run, tmp_path / "two", 2)
        train(two, *arguments, resume=True)
        assert differences(evidence(run), evidence(two)) == []


def test_all_of_an_autoencoder_goes_on_from_where_it_was(tmp_path, start, train):
    scaled = tmp_path / "scaled"
    shutil.copytree(start / "autoencoder", scaled)
    tiny.edit_json(scaled / "config.json", scaling_factor=0.5)
    # The same shape is given again. Steps too small to change anything.
    run = train(tmp_path / "run", f"start_from={scaled}", "train.learning_rate=1e-9")
    earlier = [line["held_out_psnr"] for line in metrics(start) if "held_out_psnr" in line]
    assert [line["held_out_psnr"] for line in metrics(run) if "held_out_psnr" in line] == pytest.approx(
        [earlier[-1]] * 2, abs=1e-3
    )
    (before, old, _), (after, new, _) = moments_of(scaled), moments_of(run / "autoencoder")
    assert (before.std, after.std) == ((2,) * 4, (1,) * 4), "it needs no scaling factor"
    torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-3)  # zero mean and unit variance have nothing to fold


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["autoencoder.layers_per_block=2"], r"autoencoder.layers_per_block is 2, but .*has 1; leave autoencoder out"),
        (["start_from={tmp}/nothing"], "there is no model folder .*nothing"),
        (["start_from={tmp}/grey", "autoencoder=null"], r"grey \(start_from\) cannot be trained: .*in_channels is 1"),
        (["start_from={tmp}/bare", "autoencoder=null"], r"bare \(start_from\) cannot be .*use_quant_conv is false"),
    ],
)
def test_an_autoencoder_that_cannot_be_gone_on_from_is_named(overrides, said, tmp_path, start, train):
    for name, changes in (("grey", {"in_channels": 1}), ("bare", {"use_quant_conv": False})):
        model = AutoencoderKL(AutoencoderConfig(**(tiny.VAE | changes)))
        hub.save_model(tmp_path / name, model)
    with pytest.raises(ValueError, match=said):
        train(
            tmp_path / "run",
            f"start_from={start / 'autoencoder'}",
            *(override.format(tmp=tmp_path) for override in overrides),
        )
    assert not (tmp_path / "run").exists()
    bare = [f"start_from={tmp_path / 'bare'}", "autoencoder=null", "trained=decoder", "train.max_steps=1"]
    if "bare" in said:  # nothing is folded into its decoder
        before, after = tmp_path / "bare", train(tmp_path / "run", *bare)
        codecs = [load_first_stage(str(folder)) for folder in (before, after / "autoencoder")]
        assert codecs[0].fingerprint() == codecs[1].fingerprint()
