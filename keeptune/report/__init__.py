"""A run folder arrives; one self-contained page and its numbers as JSON leave."""
