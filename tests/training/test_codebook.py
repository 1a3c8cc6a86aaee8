"""A codebook in training: revival of codes, runs that are cut, resumed or shared, and what comes of them."""

import threading

import numpy as np
import pytest
import torch
import yaml

from ldm import Pipeline, hub
from ldm.codecs import LatentCodec
from ldm.config import AutoencoderTrainingConfig, parse_config
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, DataConfig, split, to_signed
from ldm.data.layouts import open_source
from ldm.models import VectorQuantizer, VQModel
from ldm.training.autoencoder_setup import Codebook
from ldm.training.launch import run_training
from ldm.training.run import Hooks
from ldm.training.setup import load_first_stage
from tests import tiny
from tests.training.runs import (
    ROOT,
    autoencoder_settings,
    captioned_folder,
    digests,
    losses,
    metrics,
    run_ldm,
    settings,
)
from tests.training.test_resume import broken_off, torchrun
from tests.training.test_scripts import fresh_processes
from tools.torture_resume import differences, evidence

CONFIG = ROOT / "configs" / "openmoji-first-stage-vq.yaml"
CODES, CHANNELS = 12, 3


class One:
    """What `Codebook.settle` needs of accelerate."""

    num_processes = 1


class OneOfTwo:
    """The same of two processes, which are threads here: what they send is what the other gets."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, rank, shared, barrier):
        self.rank, self.shared, self.barrier = rank, shared, barrier

    def _exchange(self, tensor):
        self.shared[self.rank] = tensor.clone()
        self.barrier.wait(10)
        both = list(self.shared)
        self.barrier.wait(10)
        return both

    def reduce(self, tensor, how):
        assert how == "sum"
        return sum(self._exchange(tensor))

    def gather(self, tensor):
        return torch.cat(self._exchange(tensor))


def made(revive_after=2):
    """A codebook after a step of AdamW, so that there are moments."""
    torch.manual_seed(0)
    quantizer, averaged = VectorQuantizer(CODES, CHANNELS), VectorQuantizer(CODES, CHANNELS)
    optimizer = torch.optim.AdamW(quantizer.parameters())
    quantizer.embedding.weight.square().sum().backward()
    optimizer.step()
    codebook = Codebook(quantizer, averaged, optimizer, seed=3, revive_after=revive_after)
    return quantizer, averaged, optimizer, codebook


def latents(count=8):
    return torch.randn(count, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(7))


def add(codebook, quantizer, z, first=0):
    names = [f"image {first + i}" for i in range(len(z))]
    codebook.add(quantizer(z), [0] * len(z), names)


def everything(quantizer, averaged, optimizer, codebook):
    moments = optimizer.state[quantizer.embedding.weight]
    return {
        "codes": quantizer.embedding.weight.detach(),
        "averaged": averaged.embedding.weight.detach(),
        **{name: moments[name] for name in ("exp_avg", "exp_avg_sq")},
        **codebook.state_dict(),
    }


def stepped(parts):
    """One process, one micro-batch."""
    add(parts[3], parts[0], latents())
    parts[3].end_step(One(), 5, stepped=True)
    return everything(*parts)


def test_codes_without_use_are_put_where_latents_are():
    parts = quantizer, _, _, codebook = made()
    old = quantizer.embedding.weight.detach().clone()
    used = torch.bincount(quantizer.nearest(latents()).flatten(), minlength=CODES) > 0
    assert 0 < used.sum() < CODES
    state = stepped(parts)  # at first all count as unused
    assert torch.equal(state["codes"][used], old[used])
    rows = latents().movedim(1, -1).reshape(-1, CHANNELS)
    for code in state["codes"][~used]:
        assert (rows == code).all(dim=1).any(), "a revived code is a latent"
    assert len(state["codes"].unique(dim=0)) == CODES, "each is another"
    assert torch.equal(state["averaged"][~used], state["codes"][~used])
    assert not torch.equal(state["averaged"][used], state["codes"][used])
    for moment in ("exp_avg", "exp_avg_sq"):
        assert state[moment][used].all() and not state[moment][~used].any()
    assert not state["unused"].any()
    assert (int(state["revived"]), int(state["counts"].sum())) == (int((~used).sum()), 32)

    # From here on a code waits for two steps without use.
    few = latents()[:1]
    places = state["codes"].clone()
    now = torch.bincount(quantizer.nearest(few).flatten(), minlength=CODES) > 0
    add(codebook, quantizer, few)
    codebook.end_step(One(), 6, stepped=True)
    assert torch.equal(quantizer.embedding.weight, places)
    assert torch.equal(codebook.unused, (~now).long())
    add(codebook, quantizer, few)
    codebook.end_step(One(), 7, stepped=True)
    assert not torch.equal(quantizer.embedding.weight, places)
    # 4 latents are there at most; of more dead codes the others wait.
    assert int((codebook.unused == 0).sum()) <= int(now.sum()) + 4


def test_new_places_are_drawn_by_the_squared_distance_to_the_codes():
    """Latents that are their codes are never drawn, and far ones more often than near ones, as d² says."""
    far, near, drawn = 3.0, 1.0, []
    z = torch.zeros(2, CHANNELS, 4, 4)
    z[0, 0], z[1, 0] = near, -far
    z[:, :, 0] = 0  # a row of each is at the code
    quantizer, _, _, codebook = made()
    for step in range(400):
        with torch.no_grad():
            quantizer.embedding.weight.fill_(1e4)
            quantizer.embedding.weight[0] = 0
        codebook.unused.zero_()
        codebook.unused[5] = 1
        add(codebook, quantizer, z)
        codebook.end_step(One(), step, stepped=True)
        drawn.append(quantizer.embedding.weight[5, 0].item())
    assert set(drawn) == {near, -far}
    assert np.mean([place == -far for place in drawn]) == pytest.approx(far**2 / (far**2 + near**2), abs=0.05)


def test_a_latent_that_is_its_code_is_no_new_place():
    quantizer, _, _, codebook = made()
    z = torch.stack([quantizer.embedding.weight[3], torch.full((CHANNELS,), 7.0)]).detach()
    before = quantizer.embedding.weight.detach().clone()
    add(codebook, quantizer, z.T[None, :, None])  # [1, C, 1, 2]
    codebook.end_step(One(), 0, stepped=True)
    changed = (quantizer.embedding.weight != before).any(dim=1)
    assert int(changed.sum()) == int(codebook.revived) == 1
    assert torch.equal(quantizer.embedding.weight[changed][0], z[1])


def test_which_code_goes_where_does_not_follow_from_distances():
    """They are rounded otherwise in other processes, and two that are nearly equal would change places."""
    orders = []
    for scale in (torch.linspace(2, 3, 8), torch.linspace(3, 2, 8)):
        quantizer, _, _, codebook = made()
        torch.nn.init.zeros_(quantizer.embedding.weight)
        add(codebook, quantizer, scale.view(8, 1, 1, 1).expand(8, CHANNELS, 1, 1))  # fewer than dead codes
        codebook.end_step(One(), 0, stepped=True)
        codes = quantizer.embedding.weight[quantizer.embedding.weight.any(dim=1), 0]
        orders.append([(scale == code).nonzero().item() for code in codes.detach()])
    assert len(orders[0]) == 8
    assert orders[0] == orders[1]


def test_a_step_that_is_skipped_counts_for_nothing():
    parts = _, _, _, codebook = made()
    before = {name: value.clone() for name, value in everything(*parts).items()}
    add(codebook, parts[0], latents() * float("nan"))
    codebook.end_step(One(), 5, stepped=False)
    for name, value in everything(*parts).items():
        assert torch.equal(value, before[name]), name
    # Nor does what was only measured.
    add(codebook, parts[0], 100 + latents())
    codebook.discard_step()
    expected = stepped(made())
    for name, value in stepped(parts).items():
        assert torch.equal(value, expected[name]), name


def test_without_revival_codes_stay():
    parts = made(revive_after=None)
    before = parts[0].embedding.weight.detach().clone()
    state = stepped(parts)
    assert torch.equal(state["codes"], before)
    assert int(state["unused"].max()) == 1 and int(state["revived"]) == 0


def test_how_a_batch_is_cut_changes_nothing():
    expected = stepped(made())
    parts = quantizer, _, _, codebook = made()
    for start in (4, 0, 6, 2):  # in any order
        add(codebook, quantizer, latents()[start : start + 2], start)
    codebook.end_step(One(), 5, stepped=True)
    for name, value in everything(*parts).items():
        assert torch.equal(value, expected[name]), name


def test_two_processes_choose_the_same_as_one():
    expected = stepped(made())
    shared, barrier = [None, None], threading.Barrier(2)
    # The first has fewer latents than there are dead codes.
    ends, found = ((0, 1), (1, 8)), [None, None]
    all_parts = [made(), made()]

    def work(rank):
        parts = all_parts[rank]
        first, last = ends[rank]
        add(parts[3], parts[0], latents()[first:last], first)
        parts[3].end_step(OneOfTwo(rank, shared, barrier), 5, stepped=True)
        found[rank] = everything(*parts)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        for name, value in found[rank].items():
            assert torch.equal(value, expected[name]), (rank, name)


# ---- runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return captioned_folder(tmp_path_factory.mktemp("pictures") / "data", 40)


def arguments(folder, pictures, *more):
    """The settings of tiny runs, with a codebook instead of a posterior."""
    kept = [item for item in autoencoder_settings(folder) if not item.startswith("autoencoder.")]
    data = [f"data.path={pictures}", "data.held_out=0.2", "revive_codes_after=2"]
    shape = ["block_out_channels=[8,8,8]", "norm_num_groups=4", "num_vq_embeddings=24"]
    return [*kept, *data, *(f"vq.{item}" for item in shape), "train.max_steps=4", *more]


def train(folder, pictures, *more, resume=False):
    fresh_processes()
    config = load_config(
        CONFIG,
        ["train.mixed_precision=no", *arguments(folder, pictures, *more)],
        AutoencoderTrainingConfig,
    )
    return run_training(config, resume=resume, hooks=Hooks()).folder  # a plan takes time


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures):
    return train(tmp_path_factory.mktemp("vq") / "run", pictures, "train.checkpoint_every=2", "train.log_every=3")


def test_a_run_logs_codebook_usage(run, pictures):
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [3, 4]
    for line in lines:
        assert 1 <= line["codebook_perplexity"] <= 24 and 0 < line["codebook_used"] <= 1
        assert line["loss"] == pytest.approx(line["loss_reconstruction"] + 1.25 * line["loss_quantisation"], rel=1e-4)
    assert lines[0]["codes_revived"] > 0

    folder = run / "autoencoder"
    codec = load_first_stage(str(folder))
    assert isinstance(codec.autoencoder, VQModel)
    config = DataConfig(path=str(pictures), resolution=16)
    training, _ = split(open_source(config).samples, 0.2)
    data = CaptionedImages(training, config, 0)
    images = to_signed(torch.stack([data.image_at(i) for i in range(len(data))]))
    with torch.no_grad():
        z = codec.moments(images)
        latents = codec.sample_latents(z).double()
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3), correction=0), torch.ones(4).double(), atol=1e-4, rtol=0)

    # The average is what is exported, and diffusers' VQModel makes the same pictures of it.
    averaged = hub.load_tensors(run / "checkpoints" / "step_00000004" / "training" / "ema.safetensors")
    exported = codec.autoencoder.state_dict()
    assert exported.keys() == averaged.keys() and all(torch.equal(exported[name], averaged[name]) for name in averaged)
    from diffusers import VQModel as DiffusersVQModel

    theirs = DiffusersVQModel.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(codec.sample_latents(z)), theirs(images).sample, rtol=1e-3, atol=1e-3)


def test_a_run_that_was_broken_off_goes_on_as_if_it_were_not(run, pictures, tmp_path):
    """Broken off between two lines of the log, so that the counts since the last line have to be kept too."""
    assert (run / "checkpoints" / "step_00000002" / "training" / "codebook.safetensors").is_file()
    assert not (run / "autoencoder" / "codebook.safetensors").exists()
    two = broken_off(run, tmp_path / "two", 2)
    train(two, pictures, "train.checkpoint_every=2", "train.log_every=3", resume=True)
    assert differences(evidence(run), evidence(two)) == []


def assert_same_run(run, one):
    np.testing.assert_allclose(losses(run), losses(one), rtol=1e-4)
    for name in ("codebook_perplexity", "codebook_used", "codes_revived"):
        assert [line[name] for line in metrics(run) if name in line] == pytest.approx(
            [line[name] for line in metrics(one) if name in line], rel=1e-9
        )
    last = "checkpoints/step_00000004/training"
    for name in ("model", "codebook"):
        found, expected = (hub.load_tensors(r / last / f"{name}.safetensors") for r in (run, one))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


def test_accumulation_changes_nothing(run, pictures, tmp_path):
    two = train(tmp_path / "two", pictures, "train.gradient_accumulation_steps=4", "train.log_every=3")
    assert_same_run(two, run)


@pytest.mark.slow
def test_two_processes_train_as_one(run, pictures, tmp_path):
    more = arguments(tmp_path / "two", pictures, "train.log_every=3", "train.mixed_precision=no")
    torchrun(2, more, "--config", str(CONFIG), script="train_autoencoder.py")
    assert hub.read_json(tmp_path / "two/checkpoints/step_00000004/training/state.json")["processes"] == 2
    assert_same_run(tmp_path / "two", run)


def test_a_diffusion_model_trains_on_latents_before_quantisation(run, pictures, encoder_folder, tmp_path, capsys):
    def diffuse(folder, *more, resume=False):
        data = [f"data.path={pictures}", "data.held_out=0.2", f"data.cache_dir={tmp_path / 'cache'}"]
        return run_ldm([*settings(folder, encoder_folder, "latent", run), *data, *more], resume=resume, hooks=Hooks())

    result = diffuse(tmp_path / "one")
    assert "encoded 32 of 32 images" in capsys.readouterr().out
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (result / "vae" / name).read_bytes() == (run / "autoencoder" / name).read_bytes()
    pipeline = Pipeline.from_pretrained(result)
    assert isinstance(pipeline.codec, LatentCodec) and isinstance(pipeline.codec.autoencoder, VQModel)
    assert pipeline("a handwritten three", seed=0).images[0].size == (16, 16)
    diffuse(tmp_path / "two", "train.max_steps=2")
    assert "encoded 0 of 32 images" in capsys.readouterr().out
    diffuse(tmp_path / "two", resume=True)
    last = "checkpoints/step_00000004"
    assert digests(tmp_path / "one" / last) == digests(tmp_path / "two" / last)


def test_training_goes_on_from_a_codebook_all_of_it_or_the_decoder(run, pictures, tmp_path):
    start = [f"start_from={run / 'autoencoder'}", "vq=null"]

    def goes_on(folder, *more):
        train(folder, pictures, *start, "train.max_steps=1", *more)
        return load_first_stage(str(folder / "autoencoder"))

    before = load_first_stage(str(run / "autoencoder"))
    decoder = goes_on(tmp_path / "decoder", "trained=decoder")
    assert decoder.fingerprint() == before.fingerprint()
    assert decoder.autoencoder.config == before.autoencoder.config
    old, new = before.autoencoder.state_dict(), decoder.autoencoder.state_dict()
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder", "post_quant_conv"}

    whole = goes_on(tmp_path / "all")
    assert whole.fingerprint() != before.fingerprint()
    assert whole.autoencoder.config.latents_mean != before.autoencoder.config.latents_mean


# ---- what is refused


def described(**changes):
    content = yaml.safe_load(CONFIG.read_text())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    return content


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"autoencoder": {"block_out_channels": [32]}}, ["autoencoder and vq are both set"]),
        ({"vq": None}, ["autoencoder is missing", "vq"]),
        ({"vq": {"num_codes": 5}}, ["unknown key vq.num_codes", "did you mean"]),
        ({"vq": {"num_vq_embeddings": 0}}, ["vq: num_vq_embeddings = 0"]),
        ({"vq": {"latents_mean": [0.0]}}, ["vq.latents_mean follows from the statistics of the latents"]),
        ({"vq": {"in_channels": 1}}, ["vq.in_channels is 1; images are RGB"]),
        ({"loss": {"kl_weight": 0.1}}, ["loss.kl_weight is set", "a codebook has no such term"]),
        ({"loss": {"commitment_weight": -1.0}}, ["commitment_weight is -1.0"]),
        ({"revive_codes_after": 0}, ["revive_codes_after is 0"]),
    ],
)
def test_configs_that_cannot_be_meant_are_one_line(changes, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at below)
        parse_config(described(**changes), AutoencoderTrainingConfig, "the test")
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"loss": {"codebook_weight": 2.0}}, "a normal posterior has no such term"),
        ({"revive_codes_after": 5}, "a normal posterior has no codes"),
    ],
)
def test_what_is_for_codes_is_refused_beside_a_posterior(changes, part):
    content = yaml.safe_load((ROOT / "configs" / "digits-first-stage.yaml").read_text())
    for key, value in changes.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=part):
        parse_config(content, AutoencoderTrainingConfig, "the test")


def test_a_first_stage_of_the_other_kind_is_named(run, first_stage, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"vq describes VQModel, but .* \(start_from\) is AutoencoderKL; leave vq out"):
        train(tmp_path / "run", pictures, f"start_from={first_stage / 'autoencoder'}")
    with pytest.raises(ValueError, match=r"config.json describes a VQModel; an AutoencoderKL is needed here"):
        hub.load_model(run / "autoencoder", "AutoencoderKL")
    with pytest.raises(ValueError, match=r"describes an AutoencoderKL; a VQModel is needed here"):
        hub.load_model(first_stage / "autoencoder", "VQModel")
    tiny.edit_json(run / "autoencoder" / "config.json", _class_name="AutoencoderTiny")
    try:
        with pytest.raises(ValueError, match="describes an AutoencoderTiny; a first stage is an AutoencoderKL or a VQ"):
            load_first_stage(str(run / "autoencoder"))
    finally:
        tiny.edit_json(run / "autoencoder" / "config.json", _class_name="VQModel")
