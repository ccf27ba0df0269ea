import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_recall

from l2d_ray.core.metrics import NOT_RANKED, Reliability, bootstrap_intervals, ndcg, recall, target_ranks


@pytest.mark.parametrize("k", [1, 5, 20])
def test_recall_and_ndcg_agree_with_torchmetrics(k: int) -> None:
    random = np.random.default_rng(0)
    lists = np.stack([random.permutation(60)[:30] for _ in range(200)])
    targets = random.integers(0, 60, 200)
    ranks = target_ranks(lists, targets)
    for user in range(200):
        # torchmetrics ranks the full catalogue: listed items score by rank, the others below.
        scores = np.zeros(60)
        scores[lists[user]] = np.arange(30, 0, -1)
        relevant = torch.arange(60) == int(targets[user])
        if targets[user] not in lists[user]:
            assert ranks[user] == NOT_RANKED
            continue
        prediction = torch.from_numpy(scores)
        assert recall(ranks, k)[user] == pytest.approx(retrieval_recall(prediction, relevant, top_k=k).item())
        assert ndcg(ranks, k)[user] == pytest.approx(
            retrieval_normalized_dcg(prediction, relevant, top_k=k).item(), rel=1e-5
        )


def test_a_target_outside_its_list_scores_zero() -> None:
    ranks = target_ranks(np.array([[1, 2], [3, -1]]), np.array([9, 3]))
    assert ranks.tolist() == [NOT_RANKED, 0]
    assert recall(ranks, 100).tolist() == [0, 1]
    assert ndcg(ranks, 100).tolist() == [0, 1]


def test_the_interval_contains_the_mean_and_narrows_with_users() -> None:
    random = np.random.default_rng(1)
    hits = (random.random(4000) < 0.2).astype(float)
    (low, high), twice = bootstrap_intervals(np.stack([hits, 2 * hits], axis=1), np.arange(4000))
    np.testing.assert_allclose(twice, [2 * low, 2 * high])
    assert low < hits.mean() < high
    normal = 1.96 * hits.std() / np.sqrt(4000)
    assert (high - low) / 2 == pytest.approx(normal, rel=0.1)
    # Ten identical samples per user are worth one.
    ((low, high),) = bootstrap_intervals(np.repeat(hits[:400], 10)[:, None], np.repeat(np.arange(400), 10))
    assert (high - low) / 2 == pytest.approx(1.96 * hits[:400].std() / np.sqrt(400), rel=0.15)
    assert np.isnan(bootstrap_intervals(np.empty((0, 3)), np.empty(0, np.int64))).all()


def test_the_calibration_error_agrees_with_torchmetrics() -> None:
    """Bins of equal size are those of equal width if the probabilities are spread evenly."""
    random, predicted = np.random.default_rng(2), (np.arange(1000) + 0.5) / 1000
    order = random.permutation(1000)
    came_true = random.random(1000) < predicted**2
    found = Reliability.of(predicted[order], came_true[order])
    expected = binary_calibration_error(torch.from_numpy(predicted), torch.from_numpy(came_true).int(), n_bins=10)
    assert found.error == pytest.approx(expected.item(), rel=1e-5)
    assert found.counts_B.tolist() == [100] * 10
    assert found.means == pytest.approx((0.5, came_true.mean()))


def test_few_predictions_have_few_bins() -> None:
    assert Reliability.of(np.array([0.5, 0.2]), np.array([True, False])).predicted_B.tolist() == [0.2, 0.5]
    nothing = Reliability.of(np.empty(0), np.empty(0, np.bool_))
    assert (nothing.error, nothing.means) == (0, (0, 0))
