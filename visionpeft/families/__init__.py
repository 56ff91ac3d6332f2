"""A folder per library: how to load its models, read their anatomy, train, check, use and export them."""
