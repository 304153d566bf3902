"""The built-in scenes need more than color: the U-Net learns what a classifier of single pixels cannot."""

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import f1_score

from dida_tools.training import pytorch_training
from dida_tools.utils.data import SceneDataset
from dida_tools.utils.data.scenes import make_scenes


def pixels(dataset: SceneDataset, contract) -> tuple[np.ndarray, np.ndarray]:
    samples = dataset.with_contract(contract).for_evaluation()
    images, masks = zip(*(samples[index] for index in range(len(samples))), strict=True)
    features = np.concatenate([image.flatten(1).T.numpy() for image in images])
    labels = np.concatenate([mask.flatten().numpy() for mask in masks])
    return features[labels != 255], labels[labels != 255]


@pytest.mark.timeout(900)
@pytest.mark.slow  # a minute or two; make train shows the same
def test_the_small_unet_clearly_beats_a_per_pixel_classifier(tmp_path_factory, global_config):
    data_dir = tmp_path_factory.mktemp("scenes")
    make_scenes(data_dir)
    config = pytorch_training.small() | {"EPOCHS": 14}
    parts = config["DATASET_CONFIG"]
    train_set, test_set = (SceneDataset(**parts[part], data_dir=data_dir) for part in ("train", "test"))
    contract = train_set.contract()
    features, labels = pixels(train_set, contract)
    chosen = np.random.default_rng(0).choice(len(labels), 60_000, replace=False)
    classifier = HistGradientBoostingClassifier(max_iter=60, random_state=0).fit(
        features[chosen], labels[chosen]
    )
    test_features, test_labels = pixels(test_set, contract)
    per_pixel = f1_score(test_labels, classifier.predict(test_features), average="macro")

    result = pytorch_training.train(train_set, test_set, config, global_config)
    assert 0.6 < per_pixel < 0.85
    assert result.metrics["test.f1"] > per_pixel + 0.06
