"""Xet, receiving only: what `hf upload` of today sends for large files (hub-docs, `docs/xet/`).

    formats.py     xorbs, which carry compressed chunks, and shards, which say which chunks make a file
    receiving.py   xorbs kept for a day, and files rebuilt from them
    routes.py      what is answered

A client remembers, by the address of the store, which xorbs it has sent. So the address has an epoch in it, which ends before
xorbs are forgotten, and the repository, since a file may only be made of what was sent to the same repository. Nothing is ever
sent by Xet: files go out as plain bytes.
"""
