"""What people manage themselves: their tokens, their namespaces, and the hub. Each function checks the client's rights."""
