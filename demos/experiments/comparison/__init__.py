"""Ways of training a controller, one beside the other, at equal processor time and at equal steps."""
