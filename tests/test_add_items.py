"""jobs/add_items.py on a workspace with an index."""

from pathlib import Path

import pytest
from support.small_endpoint import write_endpoint
from support.small_workspace import ITEM_COUNT

import l2d_ray
from l2d_ray.distributed.add_items import add_items
from l2d_ray.errors import InputError
from l2d_ray.serve.releases import Release
from l2d_ray.stages.checks import add_items as check


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_added_items_are_recommended_from_the_next_release_on(tmp_path: Path) -> None:
    config, before = write_endpoint(tmp_path), None
    (tmp_path / "new.csv").write_text("item_id,title\nnew,Title 3 of the month\ni2,Title 2 of the year\n")
    config = config.replace({"data.items": str(tmp_path / "new.csv")})
    before = Release.plan(config.replace({"data": {}}))
    check(config)
    result = add_items(config)
    assert (result.version, result.items, result.new_items, result.snapshot) == (2, ITEM_COUNT + 1, 1, 2)
    again = add_items(config)
    assert (again.version, again.new_items, again.snapshot, again.index) == (2, 0, 2, result.index)
    after = Release.plan(config.replace({"data": {}}))
    assert (after.index != before.index, len(after.items())) == (True, ITEM_COUNT + 1)
    before.open()  # the old release is there, to go back to
    recommender = l2d_ray.load(tmp_path, {"model.name": config.model.name})
    (found,) = recommender.recommend(["i1", "i2"], aggregation="posterior", allow=["new"])
    assert found.title == "Title 3 of the month"
    assert recommender.recommend(["new"], k=3)


def test_what_cannot_be_added_is_refused_at_once(tmp_path: Path) -> None:
    config = write_endpoint(tmp_path / "workspace")
    (tmp_path / "new.csv").write_text("item_id,title\ni3,Another title\n")
    with pytest.raises(InputError, match="item 'i3' has the title 'Another title', but 'Title 3 of the year' in"):
        check(config.replace({"data.items": str(tmp_path / "new.csv")}))
    with pytest.raises(InputError, match=r"no snapshot; run jobs/build_memory\.py first"):
        check(config.replace({"workspace": str(tmp_path), "data.items": str(tmp_path / "new.csv")}))
