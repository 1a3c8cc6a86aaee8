"""Prior preservation: what a model knew is held while it is fine-tuned."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch

from ldm import Pipeline
from ldm.config import LDMConfig, parse_config
from ldm.diffusion import NoiseSchedule, diffusion_loss
from ldm.training import prior as module
from ldm.training.checkpoints import tensors_hash
from ldm.training.prior import PRIOR_FRACTION, SAMPLES, TIMESTEPS_PER_SAMPLE, make_prior, read_prompts
from tests import tiny
from tests.training.runs import digests, losses, metrics, run_config
from tests.training.test_finetune import content

LAST = "checkpoints/step_00000004"
PROMPTS = "noise number 1\n\n  a red square \n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.stable_diffusion().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder / "model"


def config_of(folder, model, pictures, weight=1.0, method="full", **changes):
    config = content(folder, model, pictures, method, **changes)
    config["finetune"] |= {"prior_weight": weight, "prior_prompts": str(model.parent / "prompts.txt")}
    return config


def make(model, pictures, **finetune):
    content = config_of("unused", model, pictures)
    content["finetune"] |= finetune
    config = parse_config(content, LDMConfig, "the test")
    pipeline = Pipeline.from_pretrained(model)
    return config, pipeline, make_prior(config, pipeline, SimpleNamespace(print=lambda line: None))


def batch(count, epoch=0):
    return SimpleNamespace(epochs=[epoch] * count, ids=[f"image {i}" for i in range(count)])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_model_before_has_no_difference_and_another_has(model, pictures, prediction):
    pipeline = Pipeline.from_pretrained(model)
    pipeline.schedule = dataclasses.replace(pipeline.schedule, prediction_type=prediction)
    latents = torch.randn(5, *pipeline.codec.latent_shape(16, 16))
    prior = module.frozen_predictions(pipeline, latents, ["a", "", "b", "c", "d"], seed=0)
    assert len(prior.timesteps) == 5 * TIMESTEPS_PER_SAMPLE
    assert prior.timesteps.min() < 125 and prior.timesteps.max() >= 875

    def difference():
        with torch.no_grad():
            return diffusion_loss(
                pipeline.unet,
                NoiseSchedule.from_config(pipeline.schedule),
                prior.latents,
                prior.condition,
                timesteps=prior.timesteps,
                noise=prior.noise,
                prediction_type=prediction,
            )

    assert difference().max() < 1e-6
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.5
    torch.testing.assert_close(difference().mean(), torch.tensor(0.25), rtol=1e-3, atol=0)


def test_it_is_the_same_each_time_and_a_fraction_of_any_batch(model, pictures):
    _, _, first = make(model, pictures)
    _, _, again = make(model, pictures)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("latents", "noise", "timesteps"))
    whole = first.rows(0, batch(400)).tolist()
    assert (
        0.7 * PRIOR_FRACTION < len(whole) / 400 < 1.3 * PRIOR_FRACTION and max(whole) < SAMPLES * TIMESTEPS_PER_SAMPLE
    )
    assert first.rows(0, batch(10)).tolist() == whole[: len(first.rows(0, batch(10)))]
    assert first.rows(0, batch(400, epoch=1)).tolist() != whole and first.rows(1, batch(400)).tolist() != whole


def test_prompts_are_of_a_file_or_captions_of_the_built_in_data(model, pictures, tmp_path):
    def prompts(start_from=str(model), **finetune):
        content = config_of("unused", model, pictures)
        content["start_from"] = start_from
        content["finetune"] |= finetune
        return read_prompts(parse_config(content, LDMConfig, "the test"))

    found = prompts()
    assert len(found) == SAMPLES and set(found) == {"", "noise number 1", "a red square"}
    scenes = prompts("scenes-64", prior_prompts=None)
    assert len(set(scenes)) > 80 and scenes.count("") == SAMPLES / 8
    with pytest.raises(ValueError, match=r"set finetune\.prior_prompts to"):
        prompts(prior_prompts=None)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="is empty; write a prompt per line"):
        prompts(prior_prompts=str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match=r"finetune\.prior_prompts .*missing\.txt cannot be read"):
        prompts(prior_prompts=str(tmp_path / "missing.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        prompts(prior_prompts=str(tmp_path / "latin.txt"))
    with pytest.raises(ValueError, match="prior_weight is -1"):
        prompts(prior_weight=-1)
    assert make(model, pictures, prior_weight=0, prior_prompts=None)[2] is None


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_holds_on_and_resumes_bit_for_bit(model, pictures, tmp_path, method):
    run_config(config_of(tmp_path / "whole", model, pictures, method=method))
    run_config(config_of(tmp_path / "stopped", model, pictures, method=method, train__max_steps=2))
    shutil.copytree(tmp_path / "stopped", tmp_path / "run", symlinks=True)
    run_config(config_of(tmp_path / "run", model, pictures, method=method), resume=True)
    assert digests(tmp_path / "run" / LAST) == digests(tmp_path / "whole" / LAST) != {} and losses(
        tmp_path / "run"
    ) == losses(tmp_path / "whole")
    held = [entry["prior_loss"] for entry in metrics(tmp_path / "whole") if "prior_loss" in entry]
    assert held[0] < 1e-6 < max(held)
    # The weight counts.
    for name, weight in (("free", 0.0), ("tied", 100.0)):
        run_config(config_of(tmp_path / name, model, pictures, weight=weight, method=method))
    free, tied = (digests(tmp_path / name / LAST) for name in ("free", "tied"))
    assert free and free != tied


def test_micro_batches_sum_to_the_same_gradient(model, pictures, tmp_path):
    one = run_config(config_of(tmp_path / "one", model, pictures, train__max_steps=2))
    parts = run_config(
        config_of(tmp_path / "parts", model, pictures, train__max_steps=2, train__gradient_accumulation_steps=2)
    )
    first, second = Pipeline.from_pretrained(one).unet, Pipeline.from_pretrained(parts).unet
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert tensors_hash(first.state_dict()) != tensors_hash(Pipeline.from_pretrained(model).unet.state_dict())
