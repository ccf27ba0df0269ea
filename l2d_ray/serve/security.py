"""Who may ask: bearer keys."""

import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from l2d_ray.errors import InputError


@dataclass(frozen=True)
class Keys:
    """The keys of an environment variable (parted by commas) and of a file (one a line).

    The file is read again on every check, so that keys are rotated without a restart. Without either, anybody may ask.
    """

    variable: str
    file: str | None = None

    def required(self) -> bool:
        """Whether a key is needed at all."""
        return self.file is not None or bool(self._from_environment())

    def accepts(self, key: str | None) -> bool:
        """Whether it is one of the keys; compares with each in constant time. Raises OSError if the file is away."""
        given = (key or "").encode("latin-1", "replace")  # as HTTP headers are decoded
        found = [hmac.compare_digest(given, known.encode()) for known in self._all()]
        return any(found) or not self.required()

    def check(self) -> None:
        """Raise InputError if the file cannot be read or holds no key."""
        try:
            if self.required() and not self._all():
                raise InputError(f"serve.keys_file={self.file!r}: holds no key; write one a line")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"serve.keys_file={self.file!r}: cannot be read ({error})") from None

    def _all(self) -> list[str]:
        lines = Path(self.file).read_text().splitlines() if self.file else []
        return [key for line in lines if (key := line.strip())] + self._from_environment()

    def _from_environment(self) -> list[str]:
        return [key for part in os.environ.get(self.variable, "").split(",") if (key := part.strip())]
