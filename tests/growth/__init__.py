"""Memory over many updates: `python -m tests.growth` for long runs, test_growth.py for short ones."""
