"""How feedback flows through a trajectory, measured and in words; gradients of any simulator audited; landscapes."""
