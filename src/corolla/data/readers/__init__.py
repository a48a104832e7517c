"""One small file per format of dialogues; `read.read` recognizes which."""
