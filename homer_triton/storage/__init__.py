"""Files: written without losing anything, read without trusting anything."""
