"""Models that are not here but at one other hub, such as the bases of adapters: clients are sent there, or they are kept here.

    models        a client's request for a model: sent there, or answered from here
    model_client  requests there; `model_listing` and `listing_cache`, its lists of files
    fills         a file that is fetched while clients wait; `cached_files` and `file_responses`, those that are here
    shared_files  files that all processes share in a bucket; `shared_documents`, documents

The operator names the upstream; no client can name another. A name is the upstream's only if its namespace is not this hub's
own (`namespace_owner`), so that nobody there can publish what is taken for something of this hub. Tokens of clients never go
there.
"""
