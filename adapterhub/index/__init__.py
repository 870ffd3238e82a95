"""registry.db, an index of the store in SQLite that can be rebuilt at any time.

index_database   the connection and its transactions; `index_opening` creates, rebuilds or copies the file
schema           the tables of a new file, as all `migrations` leave them
replay           the store's logs into the tables; `version_extract`, what is indexed of a version
queries          what lists, refs and maintenance ask
repository_rows  what lists know of the repositories of a hub
version_listing  pages of the newest version of every name
version_search   search by words, facts and digests; `tensor_search`, by tensors
index_file       the store's index.json
"""
