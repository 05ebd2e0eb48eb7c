"""Row programs: what a controller computes of one row, as a value from which code is made."""
