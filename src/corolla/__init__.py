"""Corolla: a large language model on a swarm of ordinary machines."""

__version__ = "0.1.0"
