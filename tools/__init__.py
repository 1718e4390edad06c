"""What runs in a checkout only."""
