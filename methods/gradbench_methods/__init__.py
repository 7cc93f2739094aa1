"""First-party methods, one a module."""
