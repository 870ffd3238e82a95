"""Object stores, and folders with the same layout."""
