"""Templates and conversations."""
