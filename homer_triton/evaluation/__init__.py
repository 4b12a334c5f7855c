"""Tasks that show what a shortened context still knows."""
