"""Training through remote blocks: soft prompts, their data, checkpoints and records."""
