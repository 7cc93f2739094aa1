"""First-party task pairs, one a module."""
