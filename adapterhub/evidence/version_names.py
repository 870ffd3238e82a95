"""How evidence names the version that it is about, and the codes of errors for evidence that names another one, or none."""

from __future__ import annotations

VERSION_HEADER = "x-adapterhub-version"
"""The header of an answer of the gateway, with the name and digest of what answered."""
VERSION_PROPERTY = "adapterhub.version"
"""The property of a JUnit suite with the name and digest of the version."""
TESTS_PROPERTY = "adapterhub.tests"
"""The property of a JUnit suite with the digest of the file of tests."""
OTHER_VERSION = "other-version"
"""The code of the error for evidence about another version."""
UNNAMED_VERSION = "unnamed-version"
"""The code of the error for evidence that does not say by its digest which version it is about."""
