"""TensorBoard's own reader finds scalars, pictures, curves and hyperparameters, of every routine."""

import importlib
import io
import pkgutil

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray

from dida_tools import training

ROUTINES = [
    module.name for module in pkgutil.iter_modules(training.__path__) if module.name.endswith("_training")
]


@pytest.fixture(params=ROUTINES)
def events(request, datasets, tiny_config, global_config) -> tuple:
    """What a short training has left, and its result."""
    routine = importlib.import_module(f"dida_tools.training.{request.param}")
    result = routine.train(*datasets, tiny_config, global_config)
    reader = EventAccumulator(str(result.log_dir / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    reader.Reload()
    return reader, result


def test_all_that_the_tabs_show(events):
    reader, result = events
    steps = [event.step for event in reader.Scalars("train/loss")]
    assert steps == list(range(1, steps[-1] + 1))
    assert reader.Scalars("validation/f1")[-1].value == pytest.approx(result.history[-1]["validation.f1"])
    assert reader.Scalars("test/f1")[-1].value == pytest.approx(result.metrics["test.f1"])

    pictures = reader.Tags()["images"]
    assert pictures and all(tag.startswith("test/") for tag in pictures)
    width, height = Image.open(io.BytesIO(reader.Images(pictures[0])[0].encoded_image_string)).size
    assert width > 3 * height

    curves = {
        tag: make_ndarray(reader.Tensors(tag)[-1].tensor_proto)
        for tag in reader.PluginTagToContent("pr_curves")
    }
    assert curves.keys() == {"test/0", "test/1", "test/2"}
    for curve in curves.values():  # true positives, false positives, ..., precision, recall by threshold
        assert curve.shape == (6, 128) and (curve[:4].sum(0) == 4 * 32 * 32).all()
        assert curve[5][0] == 1 and (curve[5][:-1] >= curve[5][1:]).all()

    found = {}
    for content in reader.PluginTagToContent("hparams").values():
        data = plugin_data_pb2.HParamsPluginData.FromString(content)
        found[data.WhichOneof("data")] = getattr(data, data.WhichOneof("data"))
    options = found["session_start_info"].hparams
    assert (
        options["OPTIMIZER_CONFIG.lr"].number_value == 0.01
        and options["MODEL"].string_value == ".models.unet:UNET"
    )
    shown = {info.name.tag for info in found["experiment"].metric_infos}
    assert {"test/f1", "validation/f1"} <= shown
    assert shown <= set(reader.Tags()["scalars"])  # the tab looks the values up there
    assert "session_end_info" in found
