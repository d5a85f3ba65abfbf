"""Records arrive, batches of token ids leave."""
