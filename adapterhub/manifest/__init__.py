"""The documents of an adapter: adapter.json, the OCI image manifest, the model card, and the files they cover.

document         adapter.json as a typed value: `AdapterManifest`
schema_versions  the versions of its schema; `record_json`, its values in JSON; `canonical_json`, its one text
derive           an adapter.json from an adapter's files, with `folder_contents`, `weight_facts`, `imported_training`,
                 `base_name`
declarations     what the owner declares in adapter.toml
oci_manifest     the OCI manifest whose digest identifies a version
package_files    the files that may be packaged; `existing_folder`, the folder that a version is written to
fact_changes     what differs between two versions
card             the model card
licensing        licenses as SPDX expressions
measurement      an evaluation as one line of a log; so are `release_statement` and `rollout_state`
"""
