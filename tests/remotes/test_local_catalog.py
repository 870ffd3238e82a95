"""The catalog of a registry here: what a client may not see is in no answer, and claims need a signature."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.index.version_search import Query
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.remotes.catalog import ContentQuery
from adapterhub.remotes.local_catalog import LocalCatalog, Visibility
from adapterhub_converters.errors import UsageError
from tests.support.adapters import Make

HIDDEN = "secret/plan"


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Iterator[Registry]:
    """A version that everybody may see, and the same one under a name that is hidden."""
    with Registry.init(tmp_path / "registry") as opened:
        for name in ("team/sql", HIDDEN):
            opened.push(make("same"), Ref(name))
        yield opened


def test_a_hidden_name_is_in_no_list_count_or_match(registry: Registry) -> None:
    catalog = LocalCatalog(registry, Visibility(lambda name: name != HIDDEN, frozenset({HIDDEN})))
    digest = registry.resolve(Ref(HIDDEN)).digest
    refs = [Ref("team/sql", number=1)]
    assert [row.ref for row in catalog.list().rows] == refs
    assert [row.ref for row in catalog.list("secret").rows] == []
    assert [row.ref for row in catalog.page(None, None, 10)[0].rows] == refs
    assert [row.ref for row in catalog.versions_with(digest)] == refs
    answer = catalog.search(Query(), facets=True)
    assert ([row.ref for row in answer.result.rows], answer.result.total) == (refs, 1)
    [matches] = catalog.find([ContentQuery("x", digest)]).matches
    assert {holder.row.ref for holder in matches.holders} == {*refs}
    [node] = catalog.lineage(refs[0])["nodes"]
    assert node["refs"] == ["team/sql:v1"]
    assert catalog.usage().report.total.versions == 1


def test_the_owner_of_the_folder_sees_all(registry: Registry) -> None:
    catalog = LocalCatalog(registry)
    assert {row.name for row in catalog.list().rows} == {"team/sql", HIDDEN}
    assert catalog.search(Query(), facets=True).result.total == 2


def test_pages_follow_each_other_and_end(registry: Registry) -> None:
    catalog, after, names = LocalCatalog(registry), None, []
    while True:
        listing, after = catalog.page(None, after, 1)
        names += [row.name for row in listing.rows]
        if after is None:
            break
    assert names == [HIDDEN, "team/sql"]


def test_an_approval_that_nobody_has_signed_is_refused(registry: Registry) -> None:
    with pytest.raises(UsageError) as refused:
        LocalCatalog(registry).approve(Ref("team/sql", number=1), "prod", "looks good")
    assert refused.value.code == "keys-to-approve"
