"""Templates name attributes that pages, requests and identities have: a misspelled one would fail only when it is shown."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import jinja2.nodes
import pytest

import adapterhub.hub.web
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.web import site
from adapterhub.hub.web.site import Page, PageRequest

for module in pkgutil.iter_modules(adapterhub.hub.web.__path__):
    importlib.import_module(f"{adapterhub.hub.web.__name__}.{module.name}")


def page_classes(base: type[Page] = Page) -> Iterator[type[Page]]:
    for page_class in base.__subclasses__():
        yield page_class
        yield from page_classes(page_class)


PAGES = {page_class.template: page_class for page_class in page_classes() if "template" in vars(page_class)}


def attributes(value: Any) -> set[str]:
    return {*dir(value), *(field.name for field in dataclasses.fields(value))}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_attribute_that_a_template_names_exists(name: str) -> None:
    environment = site.templates()
    assert environment.loader is not None
    attributes_by_owner = {"page": attributes(PAGES[name]), "asked": attributes(PageRequest), "who": attributes(Identity)}
    unknown = []
    for template in {name, "layout.html"} if name.endswith(".html") else {name}:
        source, _, _ = environment.loader.get_source(environment, template)
        for node in environment.parse(source).find_all(jinja2.nodes.Getattr):
            owner = getattr(node.node, "attr", None) or getattr(node.node, "name", None)
            is_page_of_another = template != name and owner == "page"
            if owner in attributes_by_owner and not is_page_of_another and node.attr not in attributes_by_owner[owner]:
                unknown.append(f"{template}:{node.lineno}: {owner}.{node.attr}")
    assert unknown == []
