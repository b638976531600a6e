"""Plan → something that runs: the dispatch slot of the ops, and (later) Inductor lowerings."""
