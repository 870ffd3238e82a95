"""Models that are not here but at one other hub, such as the bases of adapters: clients are sent there, or they are kept here.

The operator names the upstream; no client can name another. A name is the upstream's only if its namespace is not this hub's
own (`namespace_owner`), so that nobody there can publish what is taken for something of this hub. Tokens of clients never go
there.
"""
