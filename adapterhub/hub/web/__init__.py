"""Pages for people, rendered on the server: no script, no build step, nothing from another host.

    routes.py              the routes, by method and path
    site.py                what all pages share: templates, the account behind a request, errors, headers
    browsing.py            search, the bases and their adapters, the events of a namespace
    adapter_pages.py       the pages of an adapter: facts, use, files, tensors, versions, lineage
    channels.py            its channels, with the board of channel_board.py
    adapter_settings.py    the settings of an adapter; namespace_settings.py, those of a namespace
    file_editor.py         the editor of the card and other texts
    commit_pages.py        the commits of an adapter
    proposal_pages.py      its proposals
    gate_panel.py          what the page of a gated adapter says
    compare.py             two versions as functions
    signing_in.py          signing in and out
    admin.py               administration
    form_requests.py       reading forms, and protecting them from other sites
    facts.py               what is read from the bytes of a version, once
    cards.py               model cards as sanitized HTML; footnotes.py, theirs
    drawings.py            heat map, loss curve and lineage as SVG, which layered_layout.py lays out
    templates/             Jinja2
    static/                one style sheet, one icon

A page is a frozen value that a plain function makes with a `Worker` and a template renders, both in the same thread.
"""
