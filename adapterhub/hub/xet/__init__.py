"""Xet, receiving only: how current `hf upload` sends large files (hub-docs, `docs/xet/`).

    xet_formats.py   xorbs, which carry compressed chunks, and shards, which say which chunks make a file
    receiving.py     xorbs kept for a day, and files rebuilt from them
    routes.py        the routes

A client remembers, per address of the store, which xorbs it has sent. So the address contains an epoch, which ends before xorbs
are deleted, and the repository, because a file may only use what was sent to the same repository. Nothing is ever served
through Xet: files go out as plain bytes.
"""
