"""What the commands do, one module for each verb: each function takes `str` or `Path` and returns a value.

A `str` is read as on the command line: a path that exists, a ref of the registry such as `team/sql:v2`, or an address such as
`oci://registry.example/team/sql:v2`. A `Path` is always a path. Progress and events are callbacks; nothing is printed, no
environment is read. A `Workspace` says where names are looked up and who asks; the default one has the registry and the policy
of the working folder, and asks remotes without credentials.
"""
