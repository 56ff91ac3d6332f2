"""Methods, anatomies and plans; attaching a plan to a model; and the delta file. Knows no library but torch."""
