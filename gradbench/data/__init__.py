"""Where the data of task pairs is, and how it gets there."""
