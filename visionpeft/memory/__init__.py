"""How much memory a training run takes, known before it runs."""
