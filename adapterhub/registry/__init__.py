"""Versions and refs of one registry: the store and its index together.

registry            `Registry`, the methods that commands call
ledger              the store and its index, locked and moved together; `log_check` compares both
packaging           what a push checks, requires and records before anything is stored
moves               moves of refs; `rehearsal`, moves that are only tried; `withdrawals`, of versions
releases            what tags require, approvals, rollouts
version_lookup      the version that a ref names; `version_selection`, that of a range or a prefix of a digest
shown_version       everything about a version; `version_facts`, what a policy asks of it
content_search      versions by the bytes of a file
lineage_graph       parents and children
adapter_recipe      how an adapter was merged or converted; `merge_recipe`, how a model was, kept by `recipe_store`
conversion_cache    versions in other formats; `spectra_cache`, their spectra
measurement_log     evaluations of versions
signature_policy    signatures that a push must bring
repository_records  a hub's records: their values are `repository_documents`, their long parts `paged_mapping`
"""
