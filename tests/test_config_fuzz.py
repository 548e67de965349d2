"Every field of CraftConfig, right and wrong: `make fuzz N=…` draws many."
import pytest

import fuzz_configs as F


def test_drawn_configs_train_or_are_refused():
    tally = F.fuzz(150)
    assert tally["trained"] > 20 and tally["refused"] > 20, tally


@pytest.mark.parametrize("name", F.FIELDS)
def test_each_field_is_refused_by_name(name):
    for value in (None, [1], {"x": 1} if name == "anchor_dataset" else {}, object()):
        with pytest.raises(ValueError, match=name): F.CraftConfig(**{name: value})
