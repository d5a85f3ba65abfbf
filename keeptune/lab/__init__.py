"""The lab: a small closed world, its running text, its tasks, and models that were pre-trained on it."""
