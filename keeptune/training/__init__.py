"""A model and token tables arrive; the trained model, its checkpoints and its log leave."""
