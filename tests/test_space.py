import numpy as np
import pytest
from numpy.typing import NDArray

from l2d_ray.core.moments import Moments, item_sums
from l2d_ray.core.space import SpaceKind, drift, fit_map, fit_means


def memory(rows: int = 4000) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Ten items whose means lie along a direction of much smaller variance than another."""
    random = np.random.default_rng(0)
    items = random.integers(0, 10, rows)
    noise = random.standard_normal((rows, 3)) * [100.0, 1.0, 1.0] @ np.linalg.qr(random.standard_normal((3, 3)))[0]
    return noise + 50 + np.outer(items, [0.0, 1.0, 2.0]), items


def moments(states: NDArray[np.float64], items: NDArray[np.int64]) -> Moments:
    return Moments.of_rows(states) + Moments.of_items(*item_sums(states, items, int(items.max()) + 1))


def within(states: NDArray[np.float64], items: NDArray[np.int64]) -> NDArray[np.float64]:
    centred = np.concatenate([states[items == item] - states[items == item].mean(axis=0) for item in np.unique(items)])
    covariance: NDArray[np.float64] = centred.T @ centred / (len(states) - np.unique(items).size)
    return covariance


def test_none_changes_no_vector_and_centre_no_distance() -> None:
    states, items = memory()
    assert fit_map(moments(states, items), "none", 0.5)(states).tolist() == states.tolist()
    centred = fit_map(moments(states, items), "centre", 0.5)(states)
    np.testing.assert_allclose(centred.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(centred[0] - centred[1], states[0] - states[1])


def test_each_whitening_makes_its_covariance_the_identity() -> None:
    states, items = memory()
    total = fit_map(moments(states, items), "whiten-total", 0.0)(states)
    np.testing.assert_allclose(np.cov(total.T), np.eye(3), atol=1e-6)
    inside = fit_map(moments(states, items), "whiten-within", 0.0)(states)
    np.testing.assert_allclose(within(inside, items), np.eye(3), atol=1e-6)


def test_within_item_whitening_is_linear_discriminant_analysis() -> None:
    """After the map, the nearest mean is that of the class with the largest discriminant function for equal priors."""
    states, items = memory()
    space = fit_map(moments(states, items), "whiten-within", 0.0)
    means = np.stack([states[items == item].mean(axis=0) for item in range(10)])
    nearest = np.linalg.norm(space(states)[:, None] - space(means), axis=2).argmin(axis=1)
    precision = np.linalg.inv(within(states, items))
    discriminants = states @ precision @ means.T - 0.5 * np.einsum("id,de,ie->i", means, precision, means)
    np.testing.assert_array_equal(nearest, discriminants.argmax(axis=1))
    plain = np.linalg.norm(states[:, None] - means, axis=2).argmin(axis=1)
    assert (nearest == items).mean() > 2 * (plain == items).mean()


def test_item_means_are_posterior_means() -> None:
    """Items differ along one direction of twenty, with three rows each, in anisotropic noise."""
    random = np.random.default_rng(0)
    items = np.repeat(np.arange(2000), 3)
    root = random.standard_normal((20, 20)) + 3 * np.eye(20)
    true = np.zeros((2000, 20))
    true[:, 4] = 2 * random.standard_normal(2000)
    states = (true[items] + random.standard_normal((6000, 20))) @ root + 7
    sums, counts = item_sums(states, items, 2000)
    known = moments(states, items)
    space = fit_map(known, "whiten-within", 0.0)
    fitted = fit_means(known, "whiten-within", space)
    assert fitted.signal_D is not None
    assert fitted.signal_D[-1] == pytest.approx(4, rel=0.1)
    assert fitted.signal_D[-2] < 0.1
    raw, target = space(sums / counts[:, None]), space(true @ root + 7)
    posterior = fitted(raw, counts)
    error, before = np.square(posterior - target).sum(axis=1).mean(), np.square(raw - target).sum(axis=1).mean()
    assert before == pytest.approx(20 / 3, rel=0.05)
    assert error == pytest.approx(4 / (4 * 3 + 1), rel=0.25)  # the posterior variance after three rows
    assert fitted.axes_DD is not None
    axis, with_many_rows = fitted.axes_DD[:, -1], fitted(raw, counts * 10**9)
    np.testing.assert_allclose(with_many_rows @ axis, raw @ axis, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "centre", "whiten-total"])
def test_other_spaces_use_the_means_of_the_rows(kind: SpaceKind) -> None:
    states, items = memory()
    space = fit_map(moments(states, items), kind, 0.1)
    assert fit_means(moments(states, items), kind, space)(states, np.ones(len(states))).tolist() == states.tolist()


def test_full_shrinkage_scales_all_directions_alike() -> None:
    states, items = memory()
    space = fit_map(moments(states, items), "whiten-total", 1.0)
    assert space.matrix_DD is not None
    np.testing.assert_allclose(space.matrix_DD, np.eye(3) * space.matrix_DD[0, 0], atol=1e-12)


def test_a_direction_without_variance_gives_finite_vectors() -> None:
    states, items = memory()
    states[:, 2] = 7
    assert np.isfinite(fit_map(moments(states, items), "whiten-within", 0.0)(states)).all()


@pytest.mark.parametrize(
    ("states", "items", "kind", "problem"),
    [
        ([[1.0], [2.0]], [0, 1], "whiten-within", "2 rows of 2 items have no whiten-within covariance"),
        ([[1.0]], [0], "whiten-total", "have no whiten-total covariance"),
        ([[3.0], [3.0], [3.0]], [0, 0, 0], "whiten-within", "all rows are the same"),
    ],
)
def test_rows_without_a_covariance_are_refused(
    states: list[list[float]], items: list[int], kind: SpaceKind, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        fit_map(moments(np.array(states), np.array(items)), kind, 0.0)


def test_the_drift_is_the_change_of_the_covariance_or_of_the_mean() -> None:
    states, items = memory()
    known = moments(states, items)
    space = fit_map(known, "whiten-within", 0.0)
    assert drift(known, known, "whiten-within", space) == 0
    # Noise that is 1.1 times as large has 1.21 times the covariance.
    means = np.stack([states[items == item].mean(axis=0) for item in range(10)])[items]
    louder = moments(means + 1.1 * (states - means), items)
    assert drift(louder, known, "whiten-within", space) == pytest.approx(0.21)
    # A shift by one standard deviation along one of three directions.
    shifted = moments(states + np.linalg.inv(space.matrix_DD)[0], items)  # type: ignore[arg-type]
    assert drift(shifted, known, "whiten-within", space) == pytest.approx(1 / 3**0.5)
    assert drift(louder, known, "centre", fit_map(known, "centre", 0.0)) == 0
