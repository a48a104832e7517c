"""A span offered to the swarm: engine and transport."""
