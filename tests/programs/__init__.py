"""Row programs: every operation, whole modules, changes between calls, whole updates."""
