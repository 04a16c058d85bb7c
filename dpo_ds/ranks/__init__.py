"""The ranks of a run: which one this is, its messages, collectives, and the process's cores, memory and children."""
