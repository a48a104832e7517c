"""From files of dialogues to sequences of tokens that a model can be trained on; no torch."""
