"""The regression of item means on titles, against one that is fitted again without each item."""

import numpy as np
import pytest

from l2d_ray.core.arrays import Float64
from l2d_ray.core.titles import RIDGES, Standardisation, TitleRegression, Titles

ITEMS, SIZE, DIMENSION = 40, 6, 3


def random_titles(noise: float = 0.3, seed: int = 0) -> Titles:
    """Return titles that predict means up to some noise; every fourth item has no rows."""
    random = np.random.default_rng(seed)
    features = Standardisation.of(random.standard_normal((ITEMS, SIZE)))(random.standard_normal((ITEMS, SIZE)))
    means = features @ random.standard_normal((SIZE + 1, DIMENSION)) + noise * random.standard_normal(
        (ITEMS, DIMENSION)
    )
    weights = random.uniform(0.5, 9, ITEMS)
    weights[::4] = means[::4] = 0
    return Titles(features, means, weights)


def parts_of(titles: Titles, count: int) -> list[Titles]:
    return [Titles(*(array[part::count] for array in titles)) for part in range(count)]


def ridge(titles: Titles, strength: float) -> Float64:
    """Return the coefficients by the normal equations."""
    weighted = titles.features_IE * titles.weights_I[:, None]
    gram = weighted.T @ titles.features_IE
    return np.linalg.solve(gram + strength * np.eye(len(gram)), weighted.T @ titles.means_ID)


def test_a_prediction_is_that_of_a_regression_on_all_other_items() -> None:
    titles = random_titles()
    regression = TitleRegression.fit(lambda: [titles])
    weighted = titles.features_IE * titles.weights_I[:, None]
    strength = regression.values_E[0] - np.linalg.eigvalsh(weighted.T @ titles.features_IE)[0]
    predicted = regression.leave_own_out(titles)
    for item in range(ITEMS):
        others = titles._replace(weights_I=np.where(np.arange(ITEMS) == item, 0, titles.weights_I))
        expected = titles.features_IE[item] @ ridge(others, strength)
        np.testing.assert_allclose(predicted[item], expected, rtol=1e-6, atol=1e-8)


def test_the_ridge_has_the_smallest_error_of_these_predictions() -> None:
    for noise in (0.01, 30.0):
        titles = random_titles(noise)
        chosen = TitleRegression.fit(lambda titles=titles: [titles])
        plain = chosen.values_E - chosen.values_E[0]

        def error(values: Float64, titles: Titles = titles, chosen: TitleRegression = chosen) -> float:
            other = TitleRegression(chosen.axes_EE, values, chosen.cross_ED)
            differences = other.leave_own_out(titles) - titles.means_ID
            return float(titles.weights_I @ np.square(differences).sum(axis=1))

        scale = np.trace((titles.features_IE * titles.weights_I[:, None]).T @ titles.features_IE) / (SIZE + 1)
        smallest = np.linalg.eigvalsh((titles.features_IE * titles.weights_I[:, None]).T @ titles.features_IE)[0]
        for strength in RIDGES:
            assert error(chosen.values_E) <= error(plain + smallest + strength * scale) * (1 + 1e-9)


def test_items_without_rows_are_predicted_from_the_others() -> None:
    titles = random_titles(noise=0.1)
    truth = np.linalg.lstsq(titles.features_IE[titles.weights_I > 0], titles.means_ID[titles.weights_I > 0])[0]
    cold = titles.weights_I == 0
    predicted = TitleRegression.fit(lambda: [titles]).leave_own_out(titles)[cold]
    np.testing.assert_allclose(predicted, titles.features_IE[cold] @ truth, atol=0.5)


def test_the_predictions_do_not_depend_on_the_division_into_shards() -> None:
    titles = random_titles()
    whole = TitleRegression.fit(lambda: [titles])
    for count in (2, 7):
        parts = parts_of(titles, count)
        regression = TitleRegression.fit(lambda parts=parts: parts)
        for place, part in enumerate(parts):
            expected = whole.leave_own_out(titles)[place::count]
            np.testing.assert_allclose(regression.leave_own_out(part), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("items", [0, 1, 3])
def test_few_items_and_equal_titles_give_finite_predictions(items: int) -> None:
    states = np.ones((items, SIZE), np.float32)
    features = Standardisation.of(np.ones((5, SIZE)))(states)
    for weight in (0.0, 2.0):
        titles = Titles(features, np.full((items, DIMENSION), weight), np.full(items, weight))
        predicted = TitleRegression.fit(lambda titles=titles: [titles]).leave_own_out(titles)
        assert predicted.shape == (items, DIMENSION)
        assert np.isfinite(predicted).all()
