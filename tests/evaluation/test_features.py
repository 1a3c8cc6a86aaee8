"""Feature spaces: what they extract, what stands on their label, and what is refused."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ldm.evaluation import features as module
from ldm.evaluation.features import FeatureSpace, feature_space, load_clip, pixel_features, resized
from ldm.evaluation.fidelity import frechet_interval, kid
from ldm.models.efficientnet import EfficientNetLite0

CPU = torch.device("cpu")
WITHOUT_TORCH_FIDELITY = importlib.util.find_spec("torch_fidelity") is None
WITHOUT_OPEN_CLIP = importlib.util.find_spec("open_clip") is None


def pictures(count, height=32, width=32, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_efficientnet_sees_images_at_128_pixels():
    space = feature_space(device=CPU)
    assert (space.name, space.dimensions, space.resize) == ("efficientnet", 1280, "128 bicubic")
    assert space.label() == "EfficientNet-Lite0 features (1280, images resized to 128 bicubic)"
    assert not space.is_fid
    images = pictures(2, 48, 64)
    features = space.compute([images])
    assert features.dtype == torch.float64 and features.shape == (2, 1280)
    large = F.interpolate(images, (128, 128), mode="bicubic", antialias=True).clamp(-1, 1)
    with torch.no_grad():
        expected = EfficientNetLite0()(large)
    torch.testing.assert_close(features.float(), expected, rtol=1e-4, atol=1e-4)
    # What is 128 pixels already is not touched.
    assert torch.equal(resized(large, 128), large)


def test_batches_of_any_sizes_are_joined_in_order_and_leave_no_graph():
    space = feature_space("pixel", device=CPU)
    assert space.label() == "pixel features (64, images not resized)"
    one, other = pictures(20), pictures(3, 16, 40).requires_grad_()
    features = space.compute(iter([one, other]))
    torch.testing.assert_close(features, torch.cat([pixel_features(one), pixel_features(other)]), rtol=0, atol=1e-12)
    assert not features.requires_grad
    with pytest.raises(ValueError, match="no images"):
        space.compute([])


def test_a_large_batch_is_taken_in_parts():
    seen = []

    def extract(images):
        seen.append(len(images))
        return images.mean(dim=(2, 3))

    features = FeatureSpace("pixel", 3, "none", extract).compute([pictures(40), pictures(5)])
    assert max(seen) <= 16 and sum(seen) == 45 and features.shape == (45, 3)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"torch.uint8 \[2, 3, 32, 32\]"),
        (torch.zeros(2, 1, 32, 32), r"\[2, 1, 32, 32\]"),
        (torch.zeros(3, 32, 32), r"\[3, 32, 32\]"),
        (torch.full((1, 3, 32, 32), 255.0), "images reach 255"),
        (torch.full((1, 3, 32, 32), float("nan")), "images reach nan"),
    ],
)
def test_what_is_no_image_in_the_range_is_refused(images, said):
    with pytest.raises(ValueError, match=said):
        feature_space("pixel", device=CPU).compute([images])


def test_names_and_weights_are_checked(tmp_path: Path):
    with pytest.raises(ValueError, match='no features "vgg"; choose one of efficientnet, pixel, inception, clip'):
        feature_space("vgg", device=CPU)
    with pytest.raises(ValueError, match='"pixel" take no weights, but some/file is given'):
        feature_space("pixel", device=CPU, weights="some/file")
    with pytest.raises(ValueError, match=r"not downloaded here: fetch https://.*6726825d\.pth"):
        feature_space("inception", device=CPU)
    with pytest.raises(ValueError, match="cannot be read"):
        feature_space("inception", device=CPU, weights=tmp_path / "missing.pth")
    other = tmp_path / "other.pth"
    other.write_bytes(b"another network")
    with pytest.raises(ValueError, match=r"other\.pth has SHA-256 .*, not 6726825d"):
        feature_space("inception", device=CPU, weights=other)


@pytest.mark.skipif(not WITHOUT_TORCH_FIDELITY, reason="torch-fidelity is installed")
def test_inception_names_the_packages_it_needs(tmp_path: Path, monkeypatch):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"as if")
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(b"as if").hexdigest())
    with pytest.raises(ValueError, match=r"pip install 'torch-fidelity>=0.3,<0.5' 'torchmetrics>=1.6'$"):
        feature_space("inception", device=CPU, weights=weights)


@pytest.mark.skipif(WITHOUT_TORCH_FIDELITY, reason="torch-fidelity is not installed")
def test_inception_is_the_network_of_torch_fidelity_with_its_resize(tmp_path: Path, monkeypatch):
    import torch_fidelity

    # Random weights stand in for the file that is not at hand: the network is built once without loading any.
    weights = tmp_path / "weights.pth"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(torch_fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        blank = torch_fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    torch.save(blank.state_dict(), weights)
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    space = feature_space("inception", device=CPU, weights=weights)
    assert space.is_fid and space.dimensions == 2048
    assert space.label() == "Inception v3 features (2048, images resized to 299 bilinear as TensorFlow 1)"
    images = pictures(2)
    reference = torch_fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    expected = reference(((images + 1) * 127.5).round().to(torch.uint8))[0]
    torch.testing.assert_close(space.compute([images]).float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not WITHOUT_OPEN_CLIP, reason="open_clip is installed")
def test_clip_names_the_package_it_needs():
    with pytest.raises(ValueError, match=r"needs open_clip .*pip install 'open-clip-torch>=3.3'$"):
        feature_space("clip", device=CPU, weights="ViT-B-32:laion2b_s34b_b79k")


@pytest.mark.clip
@pytest.mark.skipif(WITHOUT_OPEN_CLIP, reason="open_clip is not installed")
def test_clip_is_the_image_tower_of_open_clip(tmp_path: Path):
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
    }
    (tmp_path / "tiny-features.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-features.json")
    model = open_clip.create_model("tiny-features").eval()
    weights = tmp_path / "tiny-features.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    space = feature_space("clip", device=CPU, weights=f"tiny-features:{weights}")
    assert space.label() == "CLIP tiny-features features (16, images resized to 32 bicubic)"
    images = pictures(2)
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.encode_image((images / 2 + 0.5 - mean) / std)
    torch.testing.assert_close(space.compute([images]).float(), expected, rtol=1e-5, atol=1e-5)
    # A wide image: its height is resized, and its middle cut out.
    wide = pictures(1, 32, 64)
    torch.testing.assert_close(space.compute([wide]), space.compute([wide[..., 16:48]]))
    captions = ["a corgi", "a red hat"]
    with torch.no_grad():
        expected = model.encode_text(open_clip.tokenizer.tokenize(captions, context_length=20))
    torch.testing.assert_close(load_clip(f"tiny-features:{weights}", CPU).embed_texts(captions), expected)
    with pytest.raises(ValueError, match="knows no model 'ViT-Z'"):
        feature_space("clip", device=CPU, weights="ViT-Z:x")


def test_torchmetrics_has_the_same_numbers_from_the_same_features():
    fid = pytest.importorskip("torchmetrics.image.fid")
    kernel = pytest.importorskip("torchmetrics.image.kid")
    space = feature_space("pixel", device=CPU)
    real, drawn = pictures(90), (pictures(80, seed=1) * 0.8 - 0.1)

    class Extractor(torch.nn.Module):
        num_features = space.dimensions

        def forward(self, images):
            return space.extract(images)

    theirs = fid.FrechetInceptionDistance(feature=Extractor(), normalize=True).set_dtype(torch.float64)
    theirs_kid = kernel.KernelInceptionDistance(feature=Extractor(), subsets=1, subset_size=80)
    for images, is_real in ((real, True), (drawn, False)):
        theirs.update(images, real=is_real)
        theirs_kid.update(images[:80], real=is_real)
    ours = space.compute([drawn]), space.compute([real])
    assert frechet_interval(*ours).mean == pytest.approx(float(theirs.compute()), rel=1e-5)
    assert kid(ours[0], ours[1][:80]).mean == pytest.approx(float(theirs_kid.compute()[0]), rel=1e-9)
