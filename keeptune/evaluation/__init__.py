"""A model and a split arrive; its answers, their scores and paired differences leave."""
