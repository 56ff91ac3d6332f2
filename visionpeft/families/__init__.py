"""One file per family of models: how to load one, read its anatomy, train, check, use and export it."""
