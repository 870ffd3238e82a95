"""Pages for people, made on the server: no script, no build, nothing from another host.

    routes.py        what is answered, by method and path
    site.py          what all pages share: templates, who asks, errors, headers
    browsing.py      search, the bases and their adapters, what happened in a namespace
    adapters.py      the pages of an adapter: facts, use, files, tensors, versions, lineage
    compare.py       two versions as functions
    signing_in.py    signing in and out
    admin.py         administration
    posting.py       what is taken from forms
    facts.py         what is read from the bytes of a version, once
    cards.py         model cards as HTML that does nothing
    drawings.py      heat map, loss curve and lineage as SVG
    remembered.py    values that are made once
    templates/       Jinja2
    static/          one style sheet, one icon

A page is a frozen value that a plain function makes with a `Worker`, and that a template renders, both in its thread.
"""
