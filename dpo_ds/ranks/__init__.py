"""The ranks of a run: which one this is, one voice for all, collectives, and this process's cores, memory and child."""
