"""Methods, anatomies and plans; what puts a plan on a model, and the delta file. Knows no library but torch."""
