import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.dataset import as_dataset
from dida_core.training.determinism import (
    EvaluationBatches,
    Samples,
    TrainingBatches,
    deterministic_algorithms,
    mix,
    seed_sample,
    seed_step,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _keep_random_states() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def draws() -> tuple:
    return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()


# ------------------------------------------------------------------------------------------------------ seeds


def test_mix_is_splitmix64():
    golden = 0x9E3779B97F4A7C15
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [mix(golden * place) for place in range(4)] == [output >> 1 for output in outputs]


def test_mix_depends_on_each_number_their_order_and_their_count():
    grid = [
        *itertools.product(range(3), range(8), range(60), range(60)),
        *(numbers for length in (0, 1, 2, 3, 5) for numbers in itertools.product(range(4), repeat=length)),
        *((number, 1) for number in (-1, 2**63, 2**70 + 7)),
    ]
    found = [mix(*numbers) for numbers in grid]
    assert len(set(found)) == len(found) and all(0 <= number < 2**63 for number in found)
    for bit in range(63):
        assert 0.45 < sum(number >> bit & 1 for number in found) / len(found) < 0.55, bit


def seed_a_step(seed: int, number: int, more: int) -> None:
    seed_step(seed, number, CPU, more)


@pytest.mark.parametrize("seed_function", [seed_a_step, seed_sample])
def test_draws_of_python_numpy_and_torch_are_a_function_of_seed_and_place(seed_function):
    found = []
    for numbers in [*itertools.product(range(3), repeat=3), (2**62, 10**9, 7)]:
        for _ in range(2):
            seed_function(*numbers)
            found.append(draws())
        assert found[-1] == found[-2] != draws()
    assert all(len({str(value) for value in values}) == 28 for values in zip(*found, strict=True))


def test_steps_and_samples_draw_differently():
    seed_sample(1, 2, 3)
    sample = draws()
    seed_step(1, 2, CPU, 3)
    assert all(one != other for one, other in zip(sample, draws(), strict=True))


# ------------------------------------------------------------------------------------------------------ order


def batches(order: TrainingBatches, epoch: int = 0, first_batch: int = 0) -> list[list[int]]:
    order.epoch, order.first_batch = epoch, first_batch
    found = list(order)
    assert len(found) == len(order) and {number for batch in found for number, _ in batch} <= {epoch}
    return [[index for _, index in batch] for batch in found]


def flat(parts: list[list[Any]]) -> list[Any]:
    return list(itertools.chain(*parts))


def test_the_order_is_a_function_of_seed_and_epoch():
    seeds = [0, 1, 2, 2**63 - 1]
    numbers = [(seed, epoch) for seed in seeds for epoch in (0, 1, 10**6)]
    orders = [tuple(TrainingBatches(50, 8, True, False, seed).order(epoch)) for seed, epoch in numbers]
    assert len(set(orders)) == len(numbers)
    draws()
    again = [tuple(TrainingBatches(50, 3, True, True, seed).order(epoch)) for seed, epoch in numbers]
    assert again == orders


def test_the_order_spreads():
    order = TrainingBatches(10, 1, True, False, 0)
    places = Counter(
        (place, index) for epoch in range(2000) for place, index in enumerate(order.order(epoch))
    )
    assert len(places) == 100 and all(140 < number < 260 for number in places.values())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("first_batch", range(6))
def test_an_epoch_resumes_with_the_rest_of_its_order(shuffle, drop_last, first_batch):
    order = TrainingBatches(23, 4, shuffle, drop_last, seed=1)
    assert batches(order, 2, first_batch) == batches(order, 2)[first_batch:]
    assert batches(order, 3, 0) == batches(TrainingBatches(23, 4, shuffle, drop_last, seed=1), 3)


# ---------------------------------------------------------------------------------------------------- loaders


class Noise(Dataset):
    def __init__(self, num_samples: int = 11) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Tensor:
        drawn = [float(index), random.random(), np.random.rand(), np.random.randint(1000), random.gauss(0, 1)]
        return torch.cat([torch.tensor(drawn), torch.rand(2), torch.randn(1)])


def load(
    num_workers: int, epochs: list[tuple[int, int]], seed: int = 4, **options: Any
) -> list[list[Tensor]]:
    order = TrainingBatches(11, 3, True, False, seed)
    loader = DataLoader(Samples(Noise(), seed), batch_sampler=order, num_workers=num_workers, **options)
    found = []
    for order.epoch, order.first_batch in epochs:
        found.append(list(loader))
        assert len(found[-1]) == len(loader)
    return found


def equal(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    pairs = [pair for parts in zip(one, other, strict=True) for pair in zip(*parts, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def test_loaders_give_the_same_with_and_without_workers_and_resume_within_an_epoch():
    epochs = [(0, 0), (1, 0), (5, 2)]
    expected = load(0, epochs)
    assert equal(load(2, epochs, persistent_workers=True), expected) and equal(load(2, epochs), expected)
    assert [len(epoch) for epoch in expected] == [4, 4, 2]
    whole = load(0, [(3, 0)])[0]
    for first_batch in range(4):
        assert equal(load(0, [(3, first_batch)]), [whole[first_batch:]])


def test_loaded_samples_differ_per_epoch_and_seed_but_not_per_visit():
    first, second, again = load(0, [(0, 0), (1, 0), (0, 0)])
    assert equal([first], [again]) and not equal([first], load(0, [(0, 0)], seed=5))
    for samples in (torch.cat(first), torch.cat(second)):
        assert all(len(column.unique()) == 11 for column in samples[:, [0, 1, 2, 4, 5, 6, 7]].T)
    ordered = [torch.cat(epoch)[torch.cat(epoch)[:, 0].argsort()] for epoch in (first, second)]
    assert not (ordered[0][:, 1:] == ordered[1][:, 1:]).any(0).all()


# ------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_takes_data_that_does_not_tell_its_shapes():
    order = EvaluationBatches(as_dataset(Noise()), 4, 1)
    assert [[index for _, index in batch] for batch in order] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_evaluation_draws_the_same_each_time_and_with_workers():
    found = []
    for num_workers in (0, 0, 2):
        order = EvaluationBatches(as_dataset(Noise()), 4, None)
        found.append(list(DataLoader(Samples(Noise(), 1), batch_sampler=order, num_workers=num_workers)))
    assert equal([found[0]], [found[1]]) and equal([found[0]], [found[2]])


# ------------------------------------------------------------------------------------------------- algorithms


def global_settings() -> tuple:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )


def test_on_the_cpu_global_settings_stay_as_they_are():
    before = global_settings()
    with pytest.raises(ValueError, match="mine"), deterministic_algorithms(CPU):
        assert global_settings() == before
        raise ValueError("mine")
    assert global_settings() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_global_settings_are_restored():
    before = global_settings()
    with pytest.raises(ValueError, match="mine"), deterministic_algorithms(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        raise ValueError("mine")
    assert global_settings() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_on_a_gpu_dropout_is_a_function_of_seed_and_step(device):
    found = []
    for number in (5, 6, 5):
        seed_step(0, number, torch.device(device))
        found.append(torch.rand(100, device=device))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
