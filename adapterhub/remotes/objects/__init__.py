"""Object stores, and folders that are laid out like one."""
