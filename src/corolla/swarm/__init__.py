"""Peers: frames, transport, directory, routing, placement."""
