"""What is kept of conversations, and for how long."""

from __future__ import annotations

import pytest
import torch

from gem_st.cli.serve import check_packages
from gem_st.serving.conversations import Conversations, num_bytes


def test_what_the_server_needs_is_installed():
    try:
        check_packages()
    except ImportError as error:
        pytest.skip(f"The server is not tested: {error}")


@pytest.fixture
def read(make_model):
    gem = make_model(freeze_base=True)[0]

    def read(ids):
        with torch.no_grad():
            return gem.reader.append(None, [ids])

    return read


def test_the_longest_prefix_is_found(read):
    kept = Conversations(2**20)
    ids = list(range(20, 60))
    assert kept.find(ids) is None
    kept.keep(read(ids[:10]))
    kept.keep(read([*ids[:20], 7, 8, 9]))
    assert len(kept) == 1  # the longer one is in the place of what it continues
    found = kept.find(ids)
    assert found.input_ids.tolist() == [ids[:20]]
    cold = read(ids[:20])
    torch.testing.assert_close(found.layers[1][0], cold.layers[1][0])
    assert kept.find(ids[:12]).input_ids.shape == (1, 12)
    assert kept.find([5, *ids]) is None
    assert kept.find(ids[:7]) is None  # too few to be worth it
    kept.keep(read(ids[:15]))
    assert len(kept) == 1  # nothing new


def test_the_least_recently_used_make_room(read):
    rows = [[start, *range(20, 39)] for start in range(5, 9)]
    size = num_bytes(read(rows[0]))
    kept = Conversations(3 * size)
    for row in rows[:3]:
        kept.keep(read(row))
    assert kept.num_bytes == 3 * size
    assert kept.find(rows[0])
    kept.keep(read(rows[3]))
    assert kept.num_bytes == 3 * size
    assert kept.find(rows[1]) is None
    assert all(kept.find(rows[index]) for index in (0, 2, 3))
    kept.keep(read([9, *range(20, 100)]))  # larger than all there is room for
    assert kept.num_bytes == 3 * size
    assert Conversations(0).find(rows[0]) is None
