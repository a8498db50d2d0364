"""Few numbers of one task, many of others: transfer between tasks."""
