"""Credentials of the AWS standard chain, which obstore leaves out the profiles of."""

from functools import cached_property
from typing import Any, Self


class AwsCredentials:
    """The credentials of the AWS standard chain, for obstore. Another process looks for its own."""

    @cached_property
    def _chain(self) -> Any:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()

    def found(self) -> Self:
        """Return itself. Raises ValueError if there are no credentials."""
        self._chain  # noqa: B018, the property raises
        return self

    def __call__(self) -> Any:
        """Return the credentials at this moment."""
        return self._chain()

    def __reduce__(self) -> tuple[Any, ...]:
        """Send nothing to other processes."""
        return type(self), ()
