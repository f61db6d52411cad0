"""Models: one clear decoder, what each architecture varies in it, and how a checkpoint fills it."""
