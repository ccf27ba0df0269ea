"""The options of recommenders with one number, which a name states or validation chooses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from l2d_ray.config import Config
from l2d_ray.recommenders.contract import Choices, Options, Study


@dataclass(frozen=True)
class TunedOptions(Options):
    """Options with one number: `name-7` states it, `name` leaves it to validation.

    A subclass has the number as a field, which is also a group of its pattern, and sets the class variables. The number
    is of the type of `DEFAULT`.
    """

    NAME: ClassVar[str]
    """Name of the recommender."""
    TUNED: ClassVar[str]
    """Name of the field."""
    VALUES: ClassVar[tuple[float, ...]]
    """Values that validation compares."""
    DEFAULT: ClassVar[float]
    """The value where there are no validation samples."""

    stated: bool
    """Whether the name has the number."""

    @classmethod
    def read(cls, config: Config, groups: Mapping[str, str]) -> Self:
        """Return the number in the name, or the default."""
        number: dict[str, Any] = {cls.TUNED: type(cls.DEFAULT)(groups.get(cls.TUNED, cls.DEFAULT))}
        return cls(stated=cls.TUNED in groups, **number)

    def studies(self, config: Config) -> list[Study]:
        """Return the study of `VALUES`, unless the name has the number."""
        if self.stated:
            return []
        trials = tuple(self.having(value) for value in self.VALUES)
        return [Study(self.NAME, self.TUNED, self.NAME, self.TUNED, trials, default=self.DEFAULT)]

    def chosen(self, choices: Choices) -> Self:
        """Return the options with the number that validation chose, unless the name has it."""
        return self if self.stated else self.having(choices[self.NAME][self.TUNED])

    def having(self, value: float) -> Self:
        """Return the options with another number."""
        number: dict[str, Any] = {self.TUNED: type(self.DEFAULT)(value)}
        return replace(self, **number)
