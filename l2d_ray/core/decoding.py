"""L2D-G, exact: the states of an item's training samples, averaged, matched with the state of a history.

Source: L2D (arXiv 2509.11524), sections on global aggregation and matching. Shapes: M memory rows, D hidden size, I
items, U users, K results.
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]


def item_sums(
    states_MD: FloatArray, items_M: IntArray, num_items: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums [I, D] and counts [I] of the states of each item's rows. Those of two memories add up to those of both."""
    sums_ID = np.zeros((num_items, states_MD.shape[1]), np.float64)
    np.add.at(sums_ID, items_M, states_MD.astype(np.float64))
    return sums_ID, np.bincount(items_M, minlength=num_items)


def global_scores(queries_UD: FloatArray, sums_ID: FloatArray, counts_I: IntArray) -> NDArray[np.float64]:
    """[U, I] S(h_t, h_v) = 1 / ||h_t - h_v||_2, with h_v the mean of v's rows.

    inf where the two are the same vector, and -inf for an item without a row, which is no candidate.
    """
    scores_UI = np.full((queries_UD.shape[0], counts_I.size), -np.inf)
    known_I = np.flatnonzero(counts_I)
    centroids_ID = sums_ID[known_I] / counts_I[known_I, None]
    for user, query_D in enumerate(queries_UD.astype(np.float64)):
        distances_I = np.linalg.norm(centroids_ID - query_D, axis=1)
        with np.errstate(divide="ignore"):
            scores_UI[user, known_I] = 1 / distances_I
    return scores_UI


def top_k(scores_UI: FloatArray, k: int) -> tuple[NDArray[np.int64], FloatArray]:
    """The K best items of each user and their scores, both [U, K]; of equal scores the smaller item index is first."""
    order_UK = np.argsort(-scores_UI, axis=1, kind="stable")[:, :k]
    return order_UK, np.take_along_axis(scores_UI, order_UK, axis=1)
