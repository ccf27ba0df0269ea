"""Settings of the data: raw files, histories, and the prompt that presents a history to the model."""

from datetime import date
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from l2d_ray.config.section import File, Section


class ColumnsConfig(Section):
    """Column names for `data.source: table`."""

    user: str = "user_id"
    """Interactions: column of the user's id."""
    item: str = "item_id"
    """Interactions: column of the item's id."""
    timestamp: str = "timestamp"
    """Interactions: column of the time, which orders a user's history. Whole numbers of any unit, or Arrow timestamps;
    data.since and data.until read whole numbers as Unix seconds."""
    title: str = "title"
    """Items: column of the title."""
    id_in_items: str | None = None
    """Items: column of the item's id. null: the name in data.columns.item."""


class DataConfig(Section):
    """Raw interactions and items, and how they become samples."""

    source: str = "demo"
    """Format of the raw files: demo, movielens, amazon, d3 or table (l2d_ray/data/sources.py). `demo` is
    MovieLens-100k, downloaded and cached. `d3` keeps the published split of D3 (arXiv 2406.14900)."""
    interactions: File | None = None
    """File, folder or URI of the raw interactions. For d3, the folder with train/, valid/ and test/."""
    items: File | None = None
    """File, folder or URI of the raw items. movielens and d3 find theirs next to the interactions."""
    columns: ColumnsConfig = ColumnsConfig()
    min_interactions: int = Field(5, ge=1)
    """k of the k-core: drop users and items with fewer interactions, until none is left to drop."""
    max_title_words: int = Field(20, ge=1)
    """Drop items with a longer title, in words. 20 is the rule of D3 (arXiv 2406.14900)."""
    since: date | None = None
    """Drop interactions before this day (UTC)."""
    until: date | None = None
    """Drop interactions on this day (UTC) or later."""
    split: Literal["time", "leave-one-out", "none"] = "time"
    """Rule that splits the samples. `time`: by the time of the target, 8:1:1 (D3). `leave-one-out`: each user's last
    two samples are for validation and test. `none`: all train, for production; jobs/evaluate.py needs another one."""
    append: bool = False
    """Add to the dataset of the workspace, instead of replacing it. What is there stays as it is. Settings of data that
    are not given are the dataset's, which must have data.split=none. l2d_ray/data/growth.py has the rules."""
    num_blocks: int | None = Field(None, ge=1)
    """Number of parts the users are divided into while preparing. Each is held in one worker's memory. null: one per 64
    MB of raw data."""
    max_users: int | None = Field(None, ge=1)
    """Keep at most this many users, for a quick look at large data. They are chosen by the hash of their id, after all
    other filters."""

    @model_validator(mode="after")
    def _check_period(self) -> Self:
        if self.since and self.until and self.since >= self.until:
            raise ValueError(f"data.since={self.since} is not before data.until={self.until}; give an earlier day")
        return self


class HistoryConfig(Section):
    """The window of a history that the model reads."""

    max_items: int = Field(10, ge=1)
    """Items in the window: the last ones of the history. 10 is the paper's."""
    stride: int = Field(10, ge=1)
    """Items by which the window's left edge moves at a time. Neighbouring samples then share their beginning, and
    windows hold max_items to max_items + stride - 1 items. 1 is the paper's window; 10 runs several times fewer tokens
    (jobs/RESULTS.md)."""


class PromptConfig(Section):
    """The prompt template. Its parts are tokenised separately and joined as token ids."""

    prefix: str = "The user watched or bought, in this order:\n"
    """Text before the items."""
    item: str = "{title}\n"
    """Text of one item, with {title} in it once."""
    suffix: str = ""
    """Text after the items. Without one, a title that fine-tuning predicts is also the history of the next sample:
    fewer tokens at the same Recall (jobs/RESULTS.md)."""
    max_item_tokens: int = Field(32, ge=1)
    """Tokens of a title; longer titles are cut."""

    @field_validator("item")
    @classmethod
    def _check_title(cls, item: str) -> str:
        if item.count("{title}") != 1:
            raise ValueError("must contain {title} exactly once; write it where the title belongs")
        return item
