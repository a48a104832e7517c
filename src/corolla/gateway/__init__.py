"""HTTP over a swarm: Petals Chat's interface, OpenAI's, and the page's own; no weights."""
