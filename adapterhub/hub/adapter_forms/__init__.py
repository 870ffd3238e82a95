"""Forms of the pages that change an adapter. They make the same changes, with the same checks, as the requests of the API.

    routes          their routes; `form_endpoint`, what each form is checked for; `multipart`, its fields and files
    name_forms      a name and its versions; `file_forms`, files
    release_forms   promotions, approvals, rollbacks, withdrawals
    proposal_forms  proposals

Forms about accounts, namespaces and the hub are with their pages, in `hub.web`.
"""
