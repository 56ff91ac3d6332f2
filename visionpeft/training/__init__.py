"""What the trainers of all families use."""
