"""The published experiments: which runs they are made of, how these are run, what comes out as tables and figures."""
