"""Files that survive a kill and notice damage: atomic writes, locks, journal, weights, checkpoints."""
