"""What the commands do, one module for each verb: each function takes `str` or `Path` and returns a value.

    sources            the adapter that a text names, by `source_names`; `base_sources`, the base
    workspace          the registry, the policy, credentials and caches of a call
    local_registry     `adapterhub.Registry`
    outgoing_version   what a push sends; `push_result`, what it returns; `transfer_plans`, what it would do
    policy_checks      a version against the policy before it is fetched, with `signature_checks`; `policy_report`, every rule
                       at once
    promotion_checks   tags at an address against the project's requirements
    attest_predicates  what `attest` claims of a version
    model_recipes      recipes of merged models; `rebuild`, `retrain` and `training_replay` make things again

A `str` is read as on the command line: a path that exists, a ref of the registry such as `team/sql:v2`, or an address such as
`oci://registry.example/team/sql:v2`. A `Path` is always a path. Progress and events are callbacks; nothing is printed, no
environment is read. A `Workspace` says where names are looked up and who asks; the default one has the registry and the policy
of the working folder, and asks remotes without credentials.
"""
