"""What the engine can do, to watch: `python -m demos` lists the demos."""
