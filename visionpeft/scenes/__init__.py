"""Generated scenes with exact labels, and a small detector trained on them: something to train on where nothing else is."""
