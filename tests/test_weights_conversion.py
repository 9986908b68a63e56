"""A conversion table has one row for a tensor, read in both directions."""

import numpy as np
import pytest

from farms_jax.weights.conversion import Layout, Row, Table, transposed

CONV = transposed(2, 3, 1, 0)


def test_a_row_is_found_by_name_and_by_path():
    table = Table([Row("layers.{}.conv.0.weight", "blocks/{}/kernel", CONV), Row("extra.{}.x", None)])
    assert table.by_name("layers.12.conv.0.weight") == Row("layers.12.conv.0.weight", "blocks/12/kernel", CONV)
    assert table.by_path("blocks/0/kernel") == Row("layers.0.conv.0.weight", "blocks/0/kernel", CONV)
    assert table.by_name("extra.3.x") == Row("extra.3.x", None)
    for name in ("layers.x.conv.0.weight", "layers.01.conv.0.weight", "layers.1.convx0.weight", "extra"):
        assert table.by_name(name) is None


def test_two_rows_for_one_tensor_are_a_fault_of_the_table():
    with pytest.raises(ValueError, match=r"a\.3 fits two rows of a table: a\.\{\} and a\.3"):
        Table([Row("a.{}", "a/{}"), Row("a.3", "b")]).by_name("a.3")


def test_layouts_go_both_ways():
    array = np.arange(120).reshape(2, 3, 4, 5)
    assert CONV.to_ours(array).shape == (4, 5, 3, 2)
    np.testing.assert_array_equal(CONV.to_theirs(CONV.to_ours(array)), array)
    row = Row("w", "w", Layout(2, lambda a: a[0], lambda a: a[None]))
    assert row.to_ours(np.zeros((1, 3))).shape == (3,)
    assert row.to_ours(np.zeros(3)).shape == (3,)  # of another rank: left as it is, for the check of shapes
