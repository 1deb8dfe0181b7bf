"""Executors: the local one, in this process, and the one on Ray."""
