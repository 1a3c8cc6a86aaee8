"""Training and scores of the scene classifier."""

import dataclasses

import pytest
import torch

from ldm.codecs import PixelCodec
from ldm.data import generator, to_signed
from ldm.data.scenes import SceneSampler, load_catalog
from ldm.evaluation.composition import AXES
from ldm.evaluation.scene_classifier import ALL_COLORS, SceneClassifier, SceneClassifierConfig, SceneClassifierNetwork
from tools.train_scene_classifier import Stream, best_peak, changed, initial_network, loss_of, scores, train

THINGS = tuple(thing.name for thing in load_catalog().things if thing.tier == 1)
TINY = SceneClassifierConfig(things=THINGS, widths=(8, 16, 32), query=16, blocks=(0, 1))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return SceneClassifier(TINY, SceneClassifierNetwork(TINY))


def test_what_was_learned_of_things_is_kept_when_others_come(tiny, tmp_path):
    tiny.save(tmp_path)
    config = dataclasses.replace(TINY, things=("a new thing", *THINGS[::-1][:20]))
    network = initial_network(config, tmp_path)
    old, new = tiny.network.state_dict(), network.state_dict()
    place = THINGS.index(config.things[5])
    for name in ("things.weight", "things.bias", "queries.weight"):
        assert torch.allclose(new[name][5], old[name][place], atol=1e-3)
    assert torch.allclose(new["features.weight"], old["features.weight"], atol=1e-3)


def test_training_saves_a_classifier(tmp_path):
    classifier = train(TINY, tmp_path, [], samples=16, batch_size=8, rate=3e-3)
    assert classifier.config == TINY and SceneClassifier.load(tmp_path).digest == classifier.digest


@pytest.mark.slow
def test_a_network_that_is_taught_a_few_scenes_reads_them():
    """Targets and predictions fit together: things, places, colors, numbers."""
    torch.manual_seed(0)
    config = SceneClassifierConfig(things=THINGS, widths=(16, 32, 64), query=32, blocks=(0, 1))
    network = SceneClassifierNetwork(config).train()
    stream = Stream(SceneSampler(load_catalog()), THINGS)
    images, objects = stream.batch(6, generator(0, "batch"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3)
    for _ in range(90):
        loss, _ = loss_of(network, to_signed(images), objects)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    names = [[THINGS[thing] for thing in objects.thing[objects.image == i].tolist()] for i in range(6)]
    predictions = SceneClassifier(config, network).predict(images, names)
    for place, prediction in enumerate(predictions):
        mine = objects.image == place
        assert prediction.count == int(mine.sum())
        assert all(look.rank <= len(set(names[place])) for look in prediction.detections)
        for look, box, color in zip(prediction.detections, objects.box[mine], objects.color[mine], strict=True):
            if names[place].count(names[place][0]) == 1:
                left, top, right, bottom = look.box
                found = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
                assert (found - box).abs().max() < 0.1
                assert look.color == ALL_COLORS[int(color)]


def test_changed_images_keep_what_can_be_seen():
    stream = Stream(SceneSampler(load_catalog()), THINGS)
    draw = generator(0, "changed")
    images, objects = stream.batch(8, draw)
    new, left = changed(images, objects, [], draw)
    assert new.shape == (8, 3, 64, 64) and float(new.abs().max()) <= 1
    assert len(left.thing) == len(left.box) <= len(objects.thing)
    assert bool(((left.box[:, :2] > 0) & (left.box[:, :2] < 1)).all())


def test_scores_are_of_every_axis_as_drawn_and_through_each_first_stage(tiny, capsys):
    found = scores(tiny, {"pixels": PixelCodec((0.0,) * 3, (1.0,) * 3)}, count=1)
    assert list(found) == list(AXES)
    for criteria in found.values():
        for figure in criteria.values():
            assert figure["scenes"] == 4 and figure["as drawn"] == figure["pixels"]
    assert "unseen phrasing" in capsys.readouterr().out
    assert 0.1 < best_peak(tiny, 6) < 0.6
