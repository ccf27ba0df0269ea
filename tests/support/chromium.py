"""The browser of the page tests."""

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Path of the browser, or None."""
MISSING = "Chromium is not installed"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
"""Mark of the tests that need it; the last lines of a run count those that were skipped."""
