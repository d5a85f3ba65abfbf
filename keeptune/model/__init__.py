"""A model folder and packed or padded batches arrive; summed losses, trained weights and artifacts leave."""
