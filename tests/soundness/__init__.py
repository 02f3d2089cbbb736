"""The adversary of ``sound=True``: random networks, every rule, hostile numbers, and oracles of higher precision."""
