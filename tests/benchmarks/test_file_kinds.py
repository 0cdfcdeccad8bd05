"""Every kind of model file: accepted with the right weights, or refused in its sentence."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # they import each other by name
    spec.loader.exec_module(module)
    return module


_load("make_checkpoint")
_load("file_variants")
_load("file_memory")
file_kinds = _load("file_kinds")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return file_kinds.Workshop(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def plain(shop, mini_sd):
    """The weights that a kind must come to."""
    models = {"mini": mini_sd}

    def get(family):
        if family not in models:
            models[family] = file_kinds.outcome(
                shop, file_kinds.Kind(file_kinds.plain(family), family)
            ).model
        return models[family]

    return get


def weights(model):
    for part in (model.unet, model.pictures.vae, *model.prompts.encoders):
        yield from part.state_dict().items()


@pytest.mark.parametrize("title", file_kinds.ACCEPTED)
def test_it_loads_with_the_right_weights(shop, plain, title):
    kind = file_kinds.ACCEPTED[title]
    result = file_kinds.outcome(shop, kind)
    assert result.model is not None, result.sentence
    assert result.model.schedule.prediction == kind.prediction
    assert bool(result.sentence) == bool(kind.says)
    assert kind.says in result.sentence
    for part in (result.model.pictures.vae, *result.model.prompts.encoders):
        # Nothing computes in 8 bits, and a module is moved and cast as a whole.
        (dtype,) = {p.dtype for p in part.parameters()}
        assert dtype.itemsize > 1
    expected = plain(kind.like)
    assert expected.family in (result.model.family, "sd1")
    for (name, ours), (_, theirs) in zip(weights(result.model), weights(expected), strict=True):
        ours, theirs = ours.float(), theirs.float()
        near = kind.tolerance * (theirs.abs() + 0.015)  # the smallest numbers of 8 bits
        assert ((ours - theirs).abs() <= near).all(), name


@pytest.mark.parametrize("title", file_kinds.REFUSED)
def test_it_is_refused_in_a_sentence(shop, title):
    kind = file_kinds.REFUSED[title]
    result = file_kinds.outcome(shop, kind)
    assert result.model is None
    assert kind.says in result.sentence
    assert "\n" not in result.sentence
