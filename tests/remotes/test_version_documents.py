"""Listings as JSON documents, and back."""

from __future__ import annotations

from adapterhub.remotes import version_documents
from adapterhub.remotes.catalog import Listing
from tests.remotes.test_hub_catalog import ROW


def test_a_listing_survives_the_way_to_a_document_and_back() -> None:
    listing = version_documents.read_listing(
        {"adapters": [ROW], "deprecations": [{"name": "team/sql", "number": None, "message": "x"}]}, ""
    )
    assert isinstance(listing, Listing)
    assert version_documents.read_listing(version_documents.listing_document(listing), "") == listing
