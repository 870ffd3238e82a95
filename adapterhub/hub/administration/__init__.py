"""What people manage themselves: their tokens, their namespaces, and the hub. Each function checks the client's rights.

own_tokens        tokens and deploy keys
profiles          what people say of themselves
namespace_admins  members, readers and quotas of a namespace; `integrations`, its webhooks and publishers
hub_admins        accounts, rules of sign-in, logs; `storage_usage`, what is stored
"""
