"""The picture of a matrix of label costs."""

import numpy as np
import pytest

from perpixel.data.cost_picture import compatibility_picture


def test_dear_pairs_are_paler_and_stand_where_their_row_and_column_say():
    costs = np.array([[0, 0.3, 1.2], [0.6, 0, 0.9], [1.5, 0.2, 0]])
    picture = np.asarray(compatibility_picture(costs, ["sky", "bird", "a long name"], cell=10).convert("L")).astype(int)[:-20]
    seen = picture[-30:, -30:][5::10, 5::10]
    assert (np.argsort(seen.ravel(), kind="stable") == np.argsort(costs.ravel(), kind="stable")).all()
    assert (picture[:-30, :-30] == 255).all()


def test_a_class_that_touched_no_other_is_grey_and_no_cost_is():
    costs = np.array([[0, 0.5, 1], [0.5, 0, 1], [1, 1, 0]])
    picture = np.asarray(compatibility_picture(costs, ["", "", ""], cell=10))[:-20]
    seen = picture[-30:, -30:][5::10, 5::10]
    grey = (seen == seen[..., :1]).all(-1)
    assert grey.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_each_name_is_written_beside_its_row_and_above_its_column():
    """Of three names one is not blank: only its strips have ink, and the strip above is the one beside, turned to read upwards."""
    picture = np.asarray(compatibility_picture(np.zeros((3, 3)), ["bird", "", ""], cell=16).convert("L"))[:-32]
    beside, above = picture[-48:, :-48], picture[:-48, -48:]
    assert [bool((beside[16 * i : 16 * i + 16] < 128).any()) for i in range(3)] == [True, False, False]
    assert (above == np.rot90(beside)).all()


def test_what_is_no_matrix_of_costs_is_refused():
    for costs, names in ((np.zeros((2, 3)), ["a", "b"]), (np.zeros((2, 2)), ["a"]), (np.full((1, 1), np.nan), ["a"])):
        with pytest.raises(ValueError, match="costs"):
            compatibility_picture(costs, names)
